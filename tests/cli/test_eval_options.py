"""Settings over the run's recipe, blind guessers, the guard, and wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.evaluating import run_eval, write_run, write_with_pictures


def evaluated(*arguments: object) -> dict[str, Any]:
    code, stdout, stderr = run_eval(*arguments, "--json", "--quiet")
    assert code == 0, stderr
    result: dict[str, Any] = json.loads(stdout)
    return result


def predictions(result: dict[str, Any]) -> list[str]:
    lines = Path(result["predictions"]).read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def test_settings_go_over_the_runs_recipe(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    section = "{max_new_tokens: 3, decoding: {method: beam, num_beams: 3}, metrics: [exact_match]}"
    run = write_run(tmp_path / "run", tiny_vlm, data, section)
    own = evaluated(run, "--data", data)
    assert own["max_new_tokens"] == 3
    assert own["decoding"] == {"method": "beam", "num_beams": 3, "stop": []}
    assert set(own["metrics"]) == {"exact_match"}
    sample = ["method=sample", "temperature=2", "top_k=5", "stop=[a, b]"]
    settings = [*(f"eval.decoding.{key}" for key in sample), "eval.max_new_tokens=4"]
    given = evaluated(run, "--data", data, *settings, "--metrics", "anls,token_f1")
    assert given["max_new_tokens"] == 4
    assert given["decoding"] == {
        "method": "sample",
        "temperature": 2.0,
        "top_p": 1.0,
        "top_k": 5,
        "stop": ["a", "b"],
    }
    assert set(given["metrics"]) == {"anls", "token_f1"}
    task = evaluated(run, "--data", data, "--task", "classification")
    assert "exact_match" not in task["metrics"], "metrics are those of the recipe's own task"


def test_another_seed_draws_other_answers(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    def drawn(seed: int) -> list[str]:
        sample = ["eval.decoding.method=sample", "eval.decoding.temperature=4"]
        output = tmp_path / "out"
        return predictions(
            evaluated(tiny_vlm, "--data", data, *sample, f"seed={seed}", "--output", output)
        )

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_blind_figures_stand_beside_the_models(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    code, stdout, stderr = run_eval(run_folder, "--data", data, "--blind")
    assert code == 0, stderr
    assert "majority answer" in stdout
    assert "blank pictures" in stdout
    result = evaluated(run_folder, "--data", data, "--blind", "--output", tmp_path / "out")
    blind = result["blind"]
    # The run's training data is the file it is evaluated on: each question was asked once there.
    assert blind["majority_answer"]["metrics"]["exact_match"]["value"] == 1.0
    assert blind["blank_pictures"]["metrics"]["exact_match"]["count"] == 4
    assert set(blind["blank_pictures"]["slices"]) == {"shape", "color"}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["blind"] == blind
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "blank" / "predictions.jsonl").read_text().splitlines()
    ]
    assert all(Path(row["images"][0]).is_file() for row in rows), "named by the real picture"


def test_the_majority_answer_is_of_the_named_training_data(
    tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(
        '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]}\n'
    )
    result = evaluated(
        tiny_vlm, "--data", data, "--blind", "--train", other, "--output", tmp_path / "out"
    )
    assert result["blind"]["majority_answer"]["metrics"]["exact_match"]["value"] == 0.0


@pytest.fixture(scope="module")
def captions(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of three pictures."""
    file = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    lines = (sample_data / "captions_eval.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    pictures = list(dict.fromkeys(row["messages"][0]["content"][0]["image"] for row in rows))[:3]
    kept = [row for row in rows if row["messages"][0]["content"][0]["image"] in pictures]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    return write_with_pictures(file, text, sample_data)


@pytest.mark.parametrize("scorer", ["likelihood", "embedding"])
def test_retrieval_is_a_task_with_figures_of_its_own(
    tiny_vlm: Path, captions: Path, tmp_path: Path, scorer: str
) -> None:
    command = [tiny_vlm, "--data", captions, "--task", "retrieval", f"eval.scorer={scorer}"]
    code, stdout, stderr = run_eval(*command, "--output", tmp_path / "out")
    assert code == 0, stderr
    assert "picture_to_text_median_rank" in stdout
    assert "pictures scored 3 of 3" in stderr
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["scorer"] == scorer
    assert written.get("subtract_prior") == (False if scorer == "likelihood" else None)
    assert "decoding" not in written
    r1 = evaluated(*command, "--metrics", "text_to_picture_r1", "--output", tmp_path / "one")
    assert set(r1["metrics"]) == {"text_to_picture_r1"}


def test_options_are_chosen_by_likelihood_with_or_without_an_answer(
    tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    options = sorted({row["messages"][-1]["content"] for row in rows} | {"seven"})
    text = "".join(json.dumps(row | {"options": options}) + "\n" for row in rows)
    file = write_with_pictures(tmp_path / "choice.jsonl", text, data.parent)
    command = [tiny_vlm, "--data", file, "--task", "choice", "--metrics"]
    alone = evaluated(*command, "choice_likelihood", "--output", tmp_path / "a")
    assert set(alone["metrics"]) == {"choice_likelihood"}
    assert set(predictions(alone)) <= set(options)
    both = evaluated(*command, "multiple_choice,choice_likelihood", "--output", tmp_path / "b")
    assert {"choice_accuracy", "choice_likelihood"} <= set(both["metrics"])
    assert both["metrics"]["choice_likelihood"] == alone["metrics"]["choice_likelihood"]
    assert not set(predictions(both)) <= set(options)


def test_metrics_are_those_of_the_runs_task(tiny_vlm: Path, captions: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tiny_vlm, captions, "{task: retrieval, scorer: embedding}")
    result = evaluated(run, "--data", captions, "--metrics", "text_to_picture_mrr")
    assert (result["scorer"], list(result["metrics"])) == ("embedding", ["text_to_picture_mrr"])


@pytest.fixture
def pointing_out(data: Path, tmp_path: Path) -> Path:
    """A question whose picture is beside the folder of the data."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "questions.jsonl"
    text = data.read_text().splitlines()[0].replace("images/", f"{data.parent}/images/")
    file.write_text(text + "\n")
    return file


def test_pictures_outside_the_datas_folder_are_used_only_where_that_is_allowed(
    tiny_vlm: Path, pointing_out: Path, tmp_path: Path
) -> None:
    command = [tiny_vlm, "--data", pointing_out, "eval.max_new_tokens=1"]
    code, _, stderr = run_eval(*command, "--output", tmp_path / "refused")
    assert code == 2
    assert f"{pointing_out}:1: the picture is outside" in stderr
    assert "data.allow_outside_paths=true" in stderr
    allowed = evaluated(*command, "data.allow_outside_paths=true", "--output", tmp_path / "allowed")
    assert allowed["num_samples"] == 1


def test_a_runs_recipe_says_what_its_evaluation_may_read(
    tiny_vlm: Path, data: Path, pointing_out: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", tiny_vlm, data, "{max_new_tokens: 1}")
    assert run_eval(run, "--data", pointing_out)[0] == 2
    for name in ("recipe.yaml", "recipe.resolved.yaml"):
        written = yaml.safe_load((run / name).read_text())
        written["data"]["allow_outside_paths"] = True
        (run / name).write_text(yaml.safe_dump(written))
    assert evaluated(run, "--data", pointing_out)["num_samples"] == 1


def test_urls_are_fetched_only_where_that_is_allowed(
    tiny_vlm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    row = data.read_text().splitlines()[0]
    file = tmp_path / "data.jsonl"
    file.write_text(re.sub(r"images/[^\"]+", "http://me:secret@127.0.0.1:9/a.png", row) + "\n")
    code, _, stderr = run_eval(tiny_vlm, "--data", file)
    assert code == 2
    assert f"{file}:1: pictures are not fetched" in stderr and "data.allow_urls=true" in stderr
    code, _, stderr = run_eval(tiny_vlm, "--data", file, "data.allow_urls=true")
    assert code == 2
    assert "not public; got: http://127.0.0.1:9/a.png" in stderr and "secret" not in stderr


@pytest.fixture
def guarded(tiny_vlm: Path, data: Path, tmp_path: Path) -> Path:
    """A run with a guard, in a folder of its own."""
    write_with_pictures(tmp_path / "old.jsonl", data.read_text(), data.parent)
    section = f"{{max_new_tokens: 3, guard: {{data: {tmp_path}/old.jsonl, max_samples: 3}}}}"
    return write_run(tmp_path / "run", tiny_vlm, data, section)


def write_before(run: Path, value: float) -> None:
    folder = run / "eval" / "guard-step-000000"
    folder.mkdir(parents=True)
    interval = {"value": value, "low": value, "high": value, "count": 3}
    (folder / "metrics.json").write_text(json.dumps({"metrics": {"exact_match": interval}}))


def test_a_run_that_forgot_ends_with_1_and_says_so(
    guarded: Path, data: Path, tmp_path: Path
) -> None:
    write_before(guarded, 1.0)
    output = tmp_path / "out"
    code, stdout, stderr = run_eval(guarded, "--data", data, "--output", output, "--json")
    assert code == 1
    assert "forgotten: guard exact_match 1.0000 before training" in stderr
    guard = json.loads(stdout)["guard"]
    assert (guard["metric"], guard["before"], guard["has_fallen"]) == ("exact_match", 1.0, True)
    assert json.loads((output / "metrics.json").read_text())["guard"] == guard
    assert len((output / "guard" / "predictions.jsonl").read_text().splitlines()) == 3
    assert run_eval(guarded, "--data", data, "--output", output, "--no-guard")[0] == 0


def test_a_run_that_remembers_ends_with_0_and_says_so(
    guarded: Path, data: Path, tmp_path: Path
) -> None:
    write_before(guarded, 0.0)
    code, stdout, _ = run_eval(guarded, "--data", data)
    assert code == 0
    assert "guard exact_match 0.0000 before training" in stdout
    assert "forgotten" not in stdout


def test_a_guard_that_was_not_measured_before_is_a_warning(guarded: Path, data: Path) -> None:
    code, _, stderr = run_eval(guarded, "--data", data)
    assert code == 0
    assert "not measured before training" in stderr


def test_a_guard_whose_data_is_gone_is_an_error_before_anything_is_answered(
    guarded: Path, data: Path, tmp_path: Path
) -> None:
    write_before(guarded, 0.0)
    (tmp_path / "old.jsonl").unlink()
    code, _, stderr = run_eval(guarded, "--data", data)
    assert code == 2
    assert "--no-guard" in stderr
    assert "answered" not in stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--metrics", "exact_mach"], "did you mean 'exact_match'"),
        (["--task", "caption", "--metrics", ""], "bad value of eval.metrics"),
        (["eval.metrcs=[anls]"], "unknown key 'eval.metrcs'; did you mean 'eval.metrics'?"),
        (["formt=table"], "unknown key 'data.eval.formt'; did you mean 'data.eval.format'?"),
        (["train.epochs=2"], "command line: train.epochs has no effect on this command"),
        (["eval.guard.max_drop=1"], "eval.guard.max_drop has no effect on this command"),
        (["eval={task: vqaa}"], "unknown value of eval.task"),
        (["data.eval=questions.jsonl"], "data.eval has no effect on this command"),
        (["--task", "vqa", "eval.task=caption"], "--task and eval.task are the same setting"),
        (["--no-guard", "eval.guard=null"], "--no-guard and eval.guard are the same setting"),
        (["--max-samples", "2", "eval.max_samples=3"], "give one of the two"),
        (["--max-new-tokens", "4"], "No such option"),
        (
            ["eval.decoding.temperature=0.5"],
            "command line: eval.decoding.temperature has no effect because eval.decoding.method is "
            "greedy; do: remove eval.decoding.temperature, or set eval.decoding.method: sample",
        ),
        (
            ["eval.decoding={method: beam, top_p: 0.5}"],
            "eval.decoding.top_p has no effect because eval.decoding.method is beam",
        ),
        (["eval.decoding.num_beams=3"], "or set eval.decoding.method: beam"),
        (["eval.decoding.method=beam", "eval.decoding.num_beams=1"], "expected: an integer, at"),
        (["eval.decoding.method=sample", "eval.decoding.temperature=0"], "a number, above 0"),
        (["eval.decoding.stop=['']"], "bad value of eval.decoding.stop[0]"),
        (["eval.decoding.method=nucleus"], "expected: one of greedy, sample, beam"),
        (["eval.scorer=embedding"], "eval.scorer has no effect because eval.task is vqa"),
        (["--task", "retrieval", "eval.decoding.stop=[x]"], "eval.decoding.stop has no effect"),
        (
            ["--task", "retrieval", "eval.scorer=embedding", "eval.subtract_prior=false"],
            "eval.subtract_prior has no effect because eval.scorer is embedding",
        ),
        (
            ["--task", "retrieval", "eval.embedding_prompt='One word:'"],
            "or set eval.scorer: embedding",
        ),
        (
            ["--task", "choice", "--metrics", "choice_likelihood", "eval.max_new_tokens=4"],
            "eval.max_new_tokens has no effect because eval.metrics is [choice_likelihood]",
        ),
        (["--metrics", "choice_likelihood"], "unknown metric"),
        (["format=tabel"], "did you mean 'table'"),
        (["prompt=What?"], "`prompt` has no effect in the format messages"),
        (["--task", "retrieval", "--metrics", "text_to_picture_r2"], "text_to_picture_r1"),
        (["--task", "retrieval", "--blind"], "--blind has no effect"),
        (["--blind"], "--blind needs the training data"),
        (["--blind", "--train", "gone.jsonl"], "no such data file"),
        (["image_dir=nowhere"], "no such folder of pictures"),
        (["--data", "gone.jsonl"], "command line: no such data file"),
        (["--train", "questions.jsonl"], "--train has no effect without --blind"),
        (["--output", "occupied"], "the output folder is occupied"),
        (["--output", "."], "the output folder is occupied"),
        (["./missing-model"], "named twice"),
    ],
)
def test_wrong_input_ends_with_2_before_a_model_is_loaded(
    arguments: list[str],
    expected: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_with_pictures(Path("questions.jsonl"), data.read_text(), data.parent)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("all of it")
    code, stdout, stderr = run_eval("./missing-model", "--data", "questions.jsonl", *arguments)
    assert code == 2
    assert stdout == ""
    assert expected in stderr
    assert "no such model folder" not in stderr
    assert "Traceback" not in stderr


def test_a_run_folder_is_no_output_folder(run_folder: Path, data: Path) -> None:
    code, _, stderr = run_eval(run_folder, "--data", data, "--output", run_folder)
    assert code == 2
    assert "occupied" in stderr
