"""Several targets: evaluated on the same samples, compared with the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.evaluating import run_eval, write_questions, write_run, write_with_pictures
from vlmtune.cli.eval_tables import print_comparison, print_result
from vlmtune.evaluation.compare import Comparison, Difference
from vlmtune.evaluation.metrics.base import Interval
from vlmtune.sessions.eval_targets import folders_of, names_of
from vlmtune.sessions.evaluate import ComparisonResult, ComparisonSummary, EvalResult


def doctored(folder: Path, source: Path, answers: dict[str, str]) -> Path:
    """A finished evaluation like `source` with other answers to some samples."""
    folder.mkdir()
    rows = [json.loads(line) for line in (source / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        row["prediction"] = answers.get(row["id"], row["prediction"])
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.json").write_text((source / "metrics.json").read_text())
    return folder


@pytest.fixture
def finished(tiny_vlm: Path, data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "finished"
    code, _, stderr = run_eval(tiny_vlm, "--data", data, "--output", folder, "--quiet")
    assert code == 0, stderr
    return folder


def test_targets_are_evaluated_and_compared(
    tiny_vlm: Path, run_folder: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    code, stdout, stderr = run_eval(
        tiny_vlm, run_folder, "--data", data, "--output", output, "--json"
    )
    assert code == 0, stderr
    result = json.loads(stdout)
    assert [one["target"] for one in result["targets"]] == [str(tiny_vlm), str(run_folder)]
    # Both as the run's recipe says.
    assert [one["max_new_tokens"] for one in result["targets"]] == [3, 3]
    (comparison,) = result["comparison"]["comparisons"]
    assert (comparison["target"], comparison["against"]) == ("receipts", "tiny-vlm")
    difference = comparison["metrics"]["exact_match"]
    assert difference["low"] <= difference["difference"] <= difference["high"]
    assert comparison["mcnemar"]["exact_match"]["p_value"] == 1.0
    written = json.loads((output / "comparison.json").read_text())
    assert written["comparisons"] == [comparison]
    assert (output / "tiny-vlm" / "predictions.jsonl").is_file()
    assert (output / "receipts" / "metrics.json").is_file()
    assert Path(result["comparison"]["changes"]) == output / "changes.jsonl"


def test_finished_evaluations_are_taken_as_they_are(finished: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]
    better = doctored(tmp_path / "better", finished, {row["id"]: row["answer"] for row in rows})
    worse = doctored(tmp_path / "worse", finished, {rows[0]["id"]: "wrong"})
    code, stdout, stderr = run_eval(
        worse, better, finished, "--output", tmp_path / "out", "--metrics", "exact_match"
    )
    assert code == 0, stderr
    for text in ("compared with worse", "better", "McNemar", "wrong to right: "):
        assert text in stdout
    changes = [
        json.loads(line) for line in (tmp_path / "out" / "changes.jsonl").read_text().splitlines()
    ]
    assert {tuple(change["changes"]) for change in changes} <= {("better",), ("better", "finished")}
    assert all(change["changes"]["better"] == "wrong_to_right" for change in changes)
    assert set(changes[0]["predictions"]) == {"worse", "better", "finished"}
    assert len(changes) == 4


def test_a_comparison_that_was_stopped_goes_on(
    tiny_vlm: Path, run_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [tiny_vlm, run_folder, "--data", data]
    assert run_eval(*command)[0] == 0
    (folder,) = (tmp_path / "eval").iterdir()
    # As a kill during the second target leaves it.
    (folder / "comparison.json").unlink()
    for path in (folder / "receipts").iterdir():
        path.unlink()
    answers = folder / "tiny-vlm" / "predictions.jsonl"
    before = answers.stat().st_mtime_ns
    code, _, stderr = run_eval(*command)
    assert code == 0
    assert f"the report in {folder.relative_to(tmp_path)}/tiny-vlm is of this" in stderr
    assert [path.name for path in (tmp_path / "eval").iterdir()] == [folder.name]
    assert answers.stat().st_mtime_ns == before
    assert (folder / "comparison.json").is_file()
    # Other settings: nothing of it is taken.
    (folder / "comparison.json").unlink()
    assert run_eval(*command, "eval.max_new_tokens=2")[0] == 0
    assert answers.stat().st_mtime_ns != before


def test_a_comparison_goes_on_with_corrected_references_and_other_figures(
    tiny_vlm: Path, run_folder: Path, sample_data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Brackets are legal in a file name and a pattern in a search for one.
    data = write_questions(tmp_path / "val[1].jsonl", sample_data, 2)
    command = [tiny_vlm, run_folder, "--data", data, "--json"]
    assert run_eval(*command)[0] == 0
    (folder,) = (tmp_path / "eval").iterdir()
    rows = (folder / "tiny-vlm" / "predictions.jsonl").read_text().splitlines()
    said = json.loads(rows[0])["prediction"]
    (folder / "comparison.json").unlink()
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[0]["messages"][-1]["content"] = said + " indeed"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, stdout, stderr = run_eval(*command)
    assert code == 0, stderr
    assert [path.name for path in (tmp_path / "eval").iterdir()] == [folder.name]
    row = json.loads((folder / "tiny-vlm" / "predictions.jsonl").read_text().splitlines()[0])
    assert (row["prediction"], row["answer"]) == (said, said + " indeed")


def test_targets_of_different_tasks_are_refused(
    tiny_vlm: Path, run_folder: Path, data: Path, tmp_path: Path
) -> None:
    other = write_run(tmp_path / "captions", tiny_vlm, data, "{task: caption}")
    code, _, stderr = run_eval(run_folder, other, "--data", data)
    assert code == 2
    assert "different tasks" in stderr
    assert "--task" in stderr


def test_runs_with_other_settings_are_evaluated_alike_and_that_is_said(
    tiny_vlm: Path, run_folder: Path, data: Path, tmp_path: Path
) -> None:
    other = write_run(tmp_path / "long", tiny_vlm, data, "{max_new_tokens: 5}")
    command = [run_folder, other, "--data", data, "--json"]
    code, stdout, stderr = run_eval(*command, "--output", tmp_path / "a")
    assert code == 0
    assert [one["max_new_tokens"] for one in json.loads(stdout)["targets"]] == [3, 3]
    assert f"{other} is evaluated as the first run's recipe says" in stderr
    assert "eval.max_new_tokens" in stderr
    _, _, stderr = run_eval(*command, "--output", tmp_path / "b", "eval.max_new_tokens=2")
    assert "recipe says" not in stderr


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda lines: lines[:2], "not of the same samples"),
        (
            lambda lines: [line.replace('"question": "', '"question": "!') for line in lines],
            "another question in",
        ),
    ],
)
def test_reports_of_other_samples_are_refused(
    finished: Path, tmp_path: Path, spoil, expected: str
) -> None:
    other = doctored(tmp_path / "other", finished, {})
    lines = (other / "predictions.jsonl").read_text().splitlines()
    (other / "predictions.jsonl").write_text("".join(line + "\n" for line in spoil(lines)))
    code, _, stderr = run_eval(finished, other, "--output", tmp_path / "out")
    assert code == 2
    assert expected in stderr


def test_a_report_of_other_samples_than_the_data_is_refused_before_a_model_is_loaded(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    code, _, stderr = run_eval(finished, "./missing", "--data", data, "--max-samples", 2)
    assert code == 2
    assert f"not of the same samples; got: 0 of --data are not in {finished}" in stderr


def test_reports_that_were_made_otherwise_are_compared_with_a_warning(
    finished: Path, tmp_path: Path
) -> None:
    other = doctored(tmp_path / "other", finished, {})
    code, _, stderr = run_eval(finished, other, "--output", tmp_path / "alike")
    assert (code, "was not evaluated as" in stderr) == (0, False)
    summary = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps(summary | {"max_new_tokens": 5}))
    code, _, stderr = run_eval(finished, other, "--output", tmp_path / "out")
    assert code == 0
    assert "other was not evaluated as finished was: max_new_tokens 5 (not 32)" in stderr


@pytest.mark.parametrize("wrong", ["./typo", "unfinished", "empty"])
def test_a_target_that_cannot_be_opened_shows_before_the_first_is_answered(
    wrong: str, tiny_vlm: Path, run_folder: Path, data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    recipe = (run_folder / "recipe.resolved.yaml").read_text()
    (tmp_path / "unfinished" / "recipe.resolved.yaml").write_text(recipe)
    code, _, stderr = run_eval(tiny_vlm, wrong, "--data", data, "--output", "out")
    assert code == 2
    assert wrong in stderr
    assert "answered" not in stderr
    assert not (tmp_path / "out").exists()


def test_a_report_of_other_references_than_the_data_is_refused_before_a_model_is_loaded(
    finished: Path, tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[2]["messages"][-1]["content"] = "corrected"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    changed = write_with_pictures(tmp_path / "changed.jsonl", text, data.parent)
    code, _, stderr = run_eval(finished, tiny_vlm, "--data", changed, "--output", tmp_path / "out")
    assert code == 2
    assert (
        f"sample '{rows[2]['id']}'; got: another answer in {finished} than in {changed}" in stderr
    )
    assert "answered" not in stderr


def test_guessing_from_one_of_several_training_sets_is_said(
    run_folder: Path, tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text())
    run = write_run(tmp_path / "b", tiny_vlm, other, "{}")
    _, _, stderr = run_eval(run_folder, run, "./typo", "--data", data, "--blind")
    assert "--blind guesses from the training data of the first run" in stderr
    _, _, stderr = run_eval(run_folder, "./typo", "--data", data, "--blind")
    assert "--blind guesses" not in stderr


def test_a_report_alone_has_nothing_to_be_compared_with(finished: Path) -> None:
    code, _, stderr = run_eval(finished)
    assert code == 2
    assert "name a second target" in stderr
    code, _, stderr = run_eval(finished, doctored(finished.parent / "b", finished, {}), "prompt=x")
    assert code == 2
    assert "have no effect without --data" in stderr
    code, _, stderr = run_eval(finished, "./missing")
    assert code == 2
    assert "--data" in stderr


def test_brackets_are_no_style_and_every_metric_is_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Difference(0.5, 1.0, 0.5, 0.0, 1.0, 2)
    comparisons = [
        Comparison("[/b]", "x[red]y", {"yes_no_accuracy": found}, {}),
        Comparison("c", "x[red]y", {"yes_no_accuracy": found, "yes_no_precision": found}, {}),
    ]
    changes = tmp_path / "changes.jsonl"
    changes.write_text("")
    summary = ComparisonSummary("x[red]y", "vqa", 2, comparisons, 0, changes)
    print_comparison(ComparisonResult([], summary))
    table = capsys.readouterr().out
    for text in ("compared with x[red]y", " [/b] ", "yes_no_precision"):
        assert text in table
    interval = Interval(1.0, 0.0, 1.0, 2)
    slices = {"[/b]": {"exact_match": interval}, ":cat:": {"exact_match": interval}}
    print_result(EvalResult("t", "vqa", 2, {}, slices, Path("predictions.jsonl")))
    assert "[/b]" in (table := capsys.readouterr().out)
    assert ":cat:" in table


def test_a_target_written_in_two_ways_is_named_twice(data: Path, tmp_path: Path) -> None:
    for one, same in (("./m", "./m/"), ("./m", "m"), ("./m", "./n/../m")):
        code, _, stderr = run_eval(one, same, "--data", data, "--output", tmp_path / "out")
        assert code == 2
        assert "named twice" in stderr


def test_targets_have_names_and_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert names_of([".", "../other", "Qwen/Qwen2.5-VL"]) == {
        ".": "here",
        "../other": "other",
        "Qwen/Qwen2.5-VL": "Qwen2.5-VL",
    }
    alike = names_of(["runs_a/adapter", "runs/a/adapter/", "/runs/a/adapter"])
    assert list(alike.values()) == ["runs_a/adapter", "runs/a/adapter", "/runs/a/adapter"]
    folders = folders_of(alike.values())
    assert list(folders.values()) == ["runs_a_adapter", "runs_a_adapter-2", "_runs_a_adapter"]
