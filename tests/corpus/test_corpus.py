"""Odd inputs through `check`, `convert` and `train`: each ends in the way stated beside it.

The rows stand together in one file, every one with its line; the files each in a recipe of their
own. Nothing ends in a traceback, and nothing is left out without a word.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml
from typer.testing import CliRunner

from tests.corpus import files, pictures, rows
from tests.data.test_bad_data import BAD_ROWS
from vlmtune.cli.app import app


@dataclass(frozen=True)
class Line:
    """A line of the file of odd rows, and what is stated about it."""

    name: str
    number: int
    ending: rows.Ending
    says: str


def invoke(*arguments: object) -> Any:
    """The command's result; any exception but an exit is a failure of its own."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert "Traceback" not in result.output
    return result


def write_rows(folder: Path) -> list[Line]:
    """`rows.jsonl` with a good row first, then every case."""
    cases = {f"row: {name}": case for name, case in rows.CASES.items()}
    for name, make in pictures.USED.items():
        cases[f"picture: {name}"] = rows.row(rows.shown(make(folder)), "used")
    for name, (make, says) in pictures.BAD.items():
        cases[f"bad picture: {name}"] = rows.row(rows.shown(make(folder)), "bad", says)
    for name, (value, says) in BAD_ROWS.items():
        if not name.startswith("sharegpt") and name != "id taken":  # which training does not mind
            line = value if isinstance(value, bytes) else json.dumps(value).encode()
            says = says.replace("data.jsonl:1", "")
            cases[f"bad row: {name}"] = rows.RowCase(line, "bad", says)
    PIL.Image.new("RGB", (8, 8)).save(folder / "ok.png")
    PIL.Image.new("RGB", (1, 5000)).save(folder / "thin.png")
    (folder / "folder").mkdir()
    (folder / "broken.mp4").write_bytes(b"no video")
    first = json.dumps({**rows.GOOD, "id": "first"}).encode()
    content = [first, *(case.line for case in cases.values())]
    (folder / "rows.jsonl").write_bytes(b"\n".join(content) + b"\n")
    return [
        Line(name, number, case.ending, case.says)
        for number, (name, case) in enumerate(cases.items(), start=2)
    ]


def write_recipe(folder: Path, tiny_vlm: Path, train: Any, **data: Any) -> Path:
    recipe = {
        "model": str(tiny_vlm),
        "lora_target": ["q_proj"],
        "rank": 2,
        "output_dir": str(folder / "run"),
        "data": {
            "train": train,
            "max_tokens": 256,
            "num_workers": 0,
            "over_length": "drop",
            "cache_dir": str(folder / "cache"),
            **data,
        },
        "train": {
            "epochs": 1,
            "batch_size": 64,
            "precision": "fp32",
            "optimizer": "adamw",
            "gradient_checkpointing": False,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "data"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[Line]:
    return write_rows(folder)


@pytest.fixture(scope="module")
def recipe(folder: Path, lines: list[Line], tiny_vlm: Path) -> Path:
    return write_recipe(folder, tiny_vlm, "rows.jsonl", on_bad_sample="skip", max_bad_fraction=1.0)


def test_the_corpus_is_large_and_has_every_ending(lines: list[Line]) -> None:
    assert len(lines) + len(files.CASES) >= 150
    assert {line.ending for line in lines} == {"used", "bad", "dropped"}


def unlike(lines: list[Line], reasons: dict[int, str]) -> list[str]:
    """The cases that did not end as stated: `reasons` are those of the lines left out."""
    wrong = []
    for line in lines:
        reason = reasons.get(line.number)
        if line.ending == "used" and reason is not None:
            wrong.append(f"{line.name}: left out: {reason}")
        if line.ending != "used" and reason is None:
            wrong.append(f"{line.name}: used")
        if line.ending != "used" and reason and not re.search(line.says, reason, re.S):
            wrong.append(f"{line.name}: {reason}")
    return wrong


def test_rows_through_train(recipe: Path, lines: list[Line], folder: Path) -> None:
    result = invoke("train", recipe)
    assert result.exit_code == 0, result.output
    entries = [json.loads(text) for text in (folder / "run" / "skipped.jsonl").open()]
    assert not unlike(lines, {entry["line"]: entry["reason"] for entry in entries})
    dropped = {entry["line"] for entry in entries if not entry["is_bad"]}
    assert dropped == {line.number for line in lines if line.ending == "dropped"}
    for entry in entries:
        assert f"rows.jsonl:{entry['line']}: " in entry["reason"]
        assert len(entry["reason"]) < 2000


def test_rows_through_check(recipe: Path, lines: list[Line]) -> None:
    result = invoke("check", recipe, "--json")
    found = json.loads(result.stdout)
    problems = {
        problem["line"]: problem["message"]
        for problem in found["problems"]
        if str(problem["file"]).endswith("rows.jsonl")
        and not problem["message"].startswith("data.train: ")  # of the set as a whole
    }
    long = [line for line in lines if line.ending == "dropped"]
    assert not unlike([line for line in lines if line not in long], problems)
    assert found["sets"]["data.train"]["too_long"] == len(long)


def test_rows_through_convert(folder: Path, lines: list[Line], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    result = invoke(
        "data", "convert", folder / "rows.jsonl", "--output", output, "data.on_bad_sample=skip"
    )
    assert result.exit_code == 0, result.output
    entries = [json.loads(text) for text in (tmp_path / "out_skipped.jsonl").open()]
    reasons = {entry["line"]: entry["reason"] for entry in entries}
    assert len(output.read_text().splitlines()) == 1 + len(lines) - len(reasons)
    # Whether a picture can be decoded, what the model's tokens are and what is learned shows later.
    assert not unlike([line for line in lines if line.number in reasons], reasons)
    told = {line.number for line in lines if line.name.startswith("bad row")}
    told -= {line.number for line in lines if line.says == "no assistant turn"}
    assert told <= reasons.keys()


@pytest.mark.parametrize("name", files.CASES)
def test_a_file_ends_as_stated(name: str, tmp_path: Path, tiny_vlm: Path) -> None:
    case = files.CASES[name]
    folder = tmp_path / "data"
    folder.mkdir()
    train = case.make(folder)
    recipe = write_recipe(folder, tiny_vlm, train)
    results = {"check": invoke("check", recipe), "train": invoke("train", recipe)}
    if isinstance(train, str) and (folder / train).exists():
        output = tmp_path / "out.jsonl"
        results["convert"] = invoke("data", "convert", folder / train, "--output", output)
    for command, result in results.items():
        if case.says is None:
            assert result.exit_code == 0, f"{command}: {result.output}"
        else:
            assert result.exit_code in (1, 2), f"{command}: {result.output}"
            assert re.search(case.says, result.output, re.S), f"{command}: {result.output}"
            places = (str(tmp_path), "recipe.yaml", str(train))
            assert any(place in result.output for place in places), f"{command}: {result.output}"
