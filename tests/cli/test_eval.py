from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from tests.cli.evaluating import run_eval as run
from vlmtune.sessions.evaluate import EvalOptions, EvalResult, evaluate


def test_json_holds_the_figures_and_nothing_else_is_on_stdout(
    tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    code, stdout, stderr = run(
        tiny_vlm, "--data", data, "--output", tmp_path, "eval.max_new_tokens=3", "--json"
    )
    assert code == 0
    result = json.loads(stdout)
    assert (result["task"], result["num_samples"], result["kind"]) == ("vqa", 4, "model")
    assert result["target"] == str(tiny_vlm)
    interval = result["metrics"]["exact_match"]
    assert 0 <= interval["low"] <= interval["value"] <= interval["high"] <= 1
    assert set(result["slices"]) == {"shape", "color"}
    rows = [json.loads(line) for line in Path(result["predictions"]).read_text().splitlines()]
    assert len(rows) == 4
    assert sum(row["score"] for row in rows) == interval["value"] * interval["count"]
    assert all(Path(row["images"][0]).is_file() for row in rows)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["metrics"] == result["metrics"]
    assert "answered 4 of 4" in stderr


def test_the_result_has_the_names_and_values_that_json_prints(
    tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    settings = ["eval.max_new_tokens=3", "eval.metrics=[anls]", "eval.max_samples=3"]
    result = evaluate(EvalOptions([str(tiny_vlm)], [data], settings, output=tmp_path, quiet=True))
    assert isinstance(result, EvalResult)
    assert (result.num_samples, result.max_new_tokens, result.seed) == (3, 3, 0)
    code, stdout, _ = run(tiny_vlm, "--data", data, *settings, "--output", tmp_path, "--json")
    assert code == 0
    printed = json.loads(stdout)
    assert printed.keys() == {field.name for field in dataclasses.fields(result)}
    assert printed["metrics"] == {"anls": dataclasses.asdict(result.metrics["anls"])}
    assert printed["predictions"] == str(result.predictions)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written.keys() < printed.keys()
    assert all(printed[key] == value for key, value in written.items())


def test_a_folder_whose_name_looks_like_a_setting_is_a_target(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["lr=0.1", "--data", data]
    code, _, stderr = run("./model", *command)
    assert code == 2 and "command line: unknown key 'lr'; did you mean" in stderr
    (tmp_path / "lr=0.1").mkdir()
    code, _, stderr = run(*command)
    assert code == 2 and "lr=0.1: the folder is not a run, an adapter or a model" in stderr


def test_a_run_is_evaluated_with_its_settings_into_its_folder(run_folder: Path, data: Path) -> None:
    code, stdout, stderr = run(run_folder, "--data", data, "--max-samples", 3)
    assert code == 0
    assert "exact_match" in stdout
    assert "95 % interval" in stdout
    assert "sized" not in stderr
    folders = list((run_folder / "eval").iterdir())
    assert [folder.name.startswith("questions-") for folder in folders] == [True]
    metrics = json.loads((folders[0] / "metrics.json").read_text())
    assert (metrics["max_new_tokens"], metrics["num_samples"]) == (3, 3)
    assert metrics["pixel_budget"] == [1024, 2304]


def test_another_pixel_budget_than_in_training_is_a_warning(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "run"
    shutil.copytree(run_folder, changed, ignore=shutil.ignore_patterns("eval"))
    file = changed / "adapter" / "processor_config.json"
    text = file.read_text()
    assert "2304" in text
    file.write_text(text.replace("2304", "4096"))
    code, _, stderr = run(
        changed, "--data", data, "--max-samples", 1, "--output", tmp_path / "out", "--quiet"
    )
    assert code == 0
    assert "not sized as in training: image.max_pixels is 2304" in stderr
    assert "4096 in its processor" in stderr


def test_a_model_is_not_written_into(
    tiny_vlm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tiny_vlm.iterdir())
    code, _, _ = run(tiny_vlm, "--data", data, "--max-samples", 1, "eval.max_new_tokens=1")
    assert code == 0
    assert sorted(tiny_vlm.iterdir()) == before
    assert next((tmp_path / "eval").iterdir()).name.startswith("tiny-vlm-questions-")


ROW = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}'


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (None, [], "questions.jsonl"),
        (f"{ROW}\n{{", [], "questions.jsonl:2: "),
        (f"{ROW}\n" + '{"messages": []}', [], "questions.jsonl:2: "),
        (
            '{"messages": [{"role": "user", "content": "Hi"}]}',
            [],
            "questions.jsonl:1: ",
        ),
        (ROW, ["--task", "vqaa"], "did you mean 'vqa'"),
        (ROW, ["quantization_bit=5"], "expected: one of 4, 8, 16"),
        (ROW, ["--max-samples", "0"], "--max-samples"),
        (ROW, ["--dtype", "float8"], "--dtype"),
        (ROW, ["--output", "questions.jsonl"], "cannot be written"),
        (ROW, [], "missing-model"),
    ],
)
def test_wrong_input_ends_with_2_and_names_the_place(
    content: str | None,
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("questions.jsonl").write_text(content + "\n")
    code, stdout, stderr = run("./missing-model", "--data", "questions.jsonl", *arguments)
    assert code == 2
    assert stdout == ""
    assert expected in stderr
    assert "Traceback" not in stderr
