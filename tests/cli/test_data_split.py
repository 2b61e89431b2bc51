"""`vlmtune data split`: options, what is printed, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmtune.cli.app import app
from vlmtune.data.dataset import load_conversations


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["data", "split", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def data(tmp_path: Path, sample_data: Path) -> Path:
    """The captions of the sample data: two for each picture."""
    rows = (sample_data / "captions_train.jsonl").read_text().splitlines()
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(rows[:80]) + "\n")
    return path


def test_both_sides_are_written_and_can_be_loaded(data: Path, sample_data: Path, tmp_path: Path):
    code, stdout, stderr = run(
        data, f"image_dir={sample_data}", "--output", tmp_path / "out", "--copy-images"
    )
    assert code == 0, stderr
    sides = [
        load_conversations([tmp_path / "out" / f"{side}.jsonl"])[0] for side in ("train", "eval")
    ]
    assert sum(map(len, sides)) == 80
    pictures = [{c.images[0].ref.split("/")[1] for c in side} for side in sides]
    assert pictures[0] and pictures[1] and not pictures[0] & pictures[1]
    assert f"{100 * len(sides[1]) / 80:.2f} % for evaluation (10 % requested)" in stdout


def test_json_holds_the_achieved_fraction(data: Path, sample_data: Path, tmp_path: Path):
    common = (data, f"image_dir={sample_data}", "--json", "--quiet", "--eval-fraction", "0.3")
    code, stdout, stderr = run(*common, "--output", tmp_path / "out")
    assert (code, stderr) == (0, "")
    result = json.loads(stdout)
    assert result["eval_samples"] + result["train_samples"] == 80
    assert result["eval_fraction"] == result["eval_samples"] / 80
    assert abs(result["eval_fraction"] - 0.3) < 0.05
    again = json.loads(run(*common, "--output", tmp_path / "again")[1])
    assert again["eval_samples"] == result["eval_samples"]
    names = [(tmp_path / name / "eval.jsonl").read_text() for name in ("out", "again")]
    assert names[0] == names[1]


@pytest.mark.parametrize("fraction", ["0", "1", "-0.5", "nan"])
def test_a_fraction_out_of_range_is_named(data: Path, tmp_path: Path, fraction: str):
    code, _, stderr = run(data, "--output", tmp_path / "out", "--eval-fraction", fraction)
    assert code == 2 and "--eval-fraction" in stderr


def test_bad_rows_end_with_2_and_no_output(data: Path, sample_data: Path, tmp_path: Path):
    data.write_text(data.read_text() + '{"id": "bad"}\n')
    common = (data, f"image_dir={sample_data}", "--output", tmp_path / "out", "--quiet")
    code, stdout, stderr = run(*common)
    assert (code, stdout) == (2, "") and f"{data}:81: " in stderr
    assert not (tmp_path / "out" / "train.jsonl").exists()
    code, _, stderr = run(*common, "data.on_bad_sample=skip")
    assert code == 0 and stderr.startswith("left out: ")


def test_only_one_picture_cannot_be_split(data: Path, sample_data: Path, tmp_path: Path):
    data.write_text("\n".join(data.read_text().splitlines()[:2]) + "\n")
    code, _, stderr = run(data, f"image_dir={sample_data}", "--output", tmp_path / "out")
    assert code == 2 and "share their pictures" in stderr
