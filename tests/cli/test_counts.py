"""Whatever a command prints of a single thing, it prints in the singular."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from tests.train.training import copy_sample, write_recipe
from vlmtune.cli.app import app

THINGS = "sample row step picture token epoch process checkpoint group tensor parameter".split()
WRONG = re.compile(rf"(?<![\w.,/-])1 (?:\w+ )?(?:{'|'.join(THINGS)})(?:s\b|es\b|\(e?s\))")


def said(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_plural_of_one_is_found() -> None:
    for text in ("vqa, 1 samples", "1 bad rows", "1 processes on cpu", "1 group(s)"):
        assert WRONG.search(text)
    assert not WRONG.search("1 sample, 11 rows, 0.1 epochs, 2,001 steps, 1 of 2 rows")


def test_one_sample_and_one_step_are_told_in_the_singular(
    tmp_path: Path, tiny_vlm: Path, sample_data: Path
) -> None:
    data = copy_sample(sample_data, tmp_path / "data", keep=1)
    keys = {"max_steps": 1, "batch_size": 1, "save_every": 1, "keep_checkpoints": 1}
    recipe = write_recipe(tmp_path, tiny_vlm=tiny_vlm, data=data)
    overrides = [f"train.{key}={value}" for key, value in keys.items()]
    overrides += [f"data.eval={data}", "eval.max_new_tokens=2", "eval.before=false"]
    for command in (
        ["check", recipe, *overrides],
        ["data", "stats", recipe, *overrides],
        ["data", "convert", data, "--output", tmp_path / "out" / "b.jsonl"],
        ["train", recipe, *overrides],
        ["eval", tmp_path / "run", "--data", data, "eval.max_new_tokens=2"],
        ["merge", tmp_path / "run", "--output", tmp_path / "merged"],
    ):
        text = said(*command)
        assert not WRONG.search(text), WRONG.search(text)
        assert re.search(r"\b1 (?:sample|row|step)\b", text) or command[0] == "merge"
