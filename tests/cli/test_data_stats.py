"""`vlmtune data stats`: what is counted and printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner

from vlmtune.cli.app import app


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["data", "stats", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def ask(name: str, question: str, picture: str, answer: str = "yes") -> dict[str, Any]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": turns}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_vlm: Path) -> Path:
    """Train and eval share a picture, a question, and one question about the shared picture."""
    for name in ("red", "blue", "green"):
        PIL.Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
    (tmp_path / "again.png").write_bytes((tmp_path / "red.png").read_bytes())
    train = [ask("a", "What?", "red.png"), ask("b", "Where?", "blue.png")]
    write_rows(tmp_path / "train.jsonl", [*train, train[0] | {"id": "c"}])
    held = [
        ask("d", "what?", "again.png"),
        ask("e", "Who?", "again.png"),
        ask("f", "Where?", "green.png"),
    ]
    write_rows(tmp_path / "eval.jsonl", held)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_vlm}\noutput_dir: run\ndata: {{train: train.jsonl, eval: eval.jsonl}}\n"
    )
    return path


def test_a_recipe_is_measured_on_both_sides_and_compared(recipe: Path):
    code, stdout, stderr = run(recipe, "--quiet")
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    folder = recipe.parent
    assert "train: 3 samples in 3 rows" in lines and "eval: 3 samples in 3 rows" in lines
    assert "1 sample repeats another sample, with the same pictures and words" in lines
    assert f"  {folder}/train.jsonl:3 repeats {folder}/train.jsonl:1" in lines
    assert "2 different pictures, used 3 times" in lines
    assert (
        "train and eval share 1 picture; of 3 samples in eval, 2 have a picture of train, "
        "2 a question of train, and 1 both of one sample of train"
    ) in lines
    assert f"  {folder}/eval.jsonl:1: picture and question of train" in lines
    assert any(line.startswith("media tokens") and line.endswith("█") for line in lines)


def test_json_is_one_object(recipe: Path):
    code, stdout, _ = run(recipe, "--json")
    result = json.loads(stdout)
    assert code == 0 and set(result) == {"train", "eval", "overlap"}
    assert result["overlap"] == {
        "pictures": 1,
        "eval_samples_with_picture": 2,
        "eval_samples_with_question": 2,
        "eval_samples_with_both": 1,
    }
    tokens = result["train"]["per_sample"]["media tokens"]
    assert tokens["percentiles"]["50"] == tokens["mean"] == 4  # 32 x 32 in squares of 16
    assert tokens["histogram"] == [{"from": 4, "to": 4, "samples": 3}]


def test_files_are_compared_with_those_that_a_setting_names(recipe: Path, tiny_vlm: Path):
    folder = recipe.parent
    of_recipe = run(recipe, "--json", "--quiet")[1]
    settings = (f"data.eval={folder / 'eval.jsonl'}", f"model={tiny_vlm}")
    code, stdout, stderr = run(folder / "train.jsonl", *settings, "--json", "--quiet")
    assert (code, stdout) == (0, of_recipe), stderr


def test_tokens_can_be_left_out(recipe: Path, tiny_vlm: Path):
    result = json.loads(run(recipe, "--no-tokens", "--json")[1])
    assert "tokens" not in result["train"]["per_sample"]
    data = recipe.parent / "train.jsonl"
    result = json.loads(run(data, "--json")[1])
    assert "tokens" not in result["data"]["per_sample"] and result["overlap"] is None
    result = json.loads(run(data, "--model", tiny_vlm, "--json")[1])
    assert "tokens" in result["data"]["per_sample"]
    code, _, stderr = run(data, "--tokens")
    assert code == 2 and "--model" in stderr


def test_a_part_is_said_to_be_one(recipe: Path):
    _, stdout, _ = run(recipe, "--no-tokens", "--max-samples", 2, "--quiet")
    assert "train: 2 samples in 2 of 3 rows, evenly spaced" in stdout


def test_bad_rows_stop_it_or_are_counted(recipe: Path):
    data = recipe.parent / "train.jsonl"
    data.write_text(data.read_text() + json.dumps(ask("g", "x", "gone.png")) + "\n")
    code, stdout, stderr = run(data, "--quiet")
    assert (code, stdout) == (2, "") and f"{data}:4: " in stderr
    code, stdout, stderr = run(data, "--quiet", "data.on_bad_sample=skip")
    assert code == 0 and "left out: " in stderr
    assert "1 row cannot be used" in stdout and "data: 3 samples in 4 rows" in stdout


def test_too_long_samples_are_said(recipe: Path):
    settings = ("data.max_tokens=8", "data.over_length=drop")
    code, stdout, _ = run(recipe, *settings, "--quiet")
    assert code == 0
    assert "3 samples are too long, and left out of training" in stdout
