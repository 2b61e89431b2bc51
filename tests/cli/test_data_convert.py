"""`vlmtune data convert`: options, what is printed, exit codes."""

from __future__ import annotations

import base64
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner

from tests.signals import hears_ctrl_c
from vlmtune.cli.app import app
from vlmtune.data.dataset import load_conversations

ANSWER = {"role": "assistant", "content": "red"}


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["data", "convert", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PIL.Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    return tmp_path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ask(number: int, picture: str = "red.png") -> dict[str, Any]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    return {"id": f"row-{number}", "messages": [{"role": "user", "content": content}, ANSWER]}


def write_recipe(folder: Path, data: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"model: someone/model\noutput_dir: run\ndata: {data}\n")
    return path


def test_what_was_written_is_printed(folder: Path):
    source = write_rows(folder / "a.jsonl", [ask(0) | {"mood": 1}, ask(1)])
    code, stdout, stderr = run(source, "--output", folder / "b.jsonl")
    assert code == 0
    assert stdout.splitlines() == [
        f"{folder / 'b.jsonl'}: 2 samples of 2 rows",
        "keys that are not in the output, with the number of rows: mood (1)",
    ]
    assert "format messages (detected)" in stderr and "converted 2 of 2" in stderr


def test_json_is_one_object_and_quiet_is_quiet(folder: Path):
    source = write_rows(folder / "a.jsonl", [ask(0), ask(1, "gone.png")])
    output = folder / "out" / "b.jsonl"
    options = ("--json", "--quiet", "data.on_bad_sample=skip", "--copy-images")
    code, stdout, stderr = run(source, "--output", output, *options)
    assert code == 0
    result = json.loads(stdout)
    assert result["samples"] == 1 and result["rows"] == 2 and result["bad_rows"] == 1
    assert result["pictures_written"] == 1 and result["outside_references"] == 0
    assert result["skipped"] == str(folder / "out" / "b_skipped.jsonl")
    assert [line.startswith("left out: ") for line in stderr.splitlines()] == [True]
    assert f"{source}:2:" in stderr
    assert len(load_conversations([output])[0]) == 1


def test_pictures_elsewhere_are_said(folder: Path):
    source = write_rows(folder / "a.jsonl", [ask(0)])
    _, stdout, _ = run(source, "--output", folder / "out" / "b.jsonl")
    assert "1 path leads out" in stdout and "allow_outside_paths" in stdout


def test_weights_that_are_not_kept_are_said(folder: Path):
    for name in ("a", "c"):
        write_rows(folder / f"{name}.jsonl", [ask(0 if name == "a" else 1)])
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "model: a/b\noutput_dir: out\ndata: {train: [a.jsonl, {path: c.jsonl, weight: 2.5}]}\n"
    )
    _, stdout, _ = run(recipe, "--output", folder / "b.jsonl")
    assert (
        f"weights are not in the output, each row is written once: {folder / 'c.jsonl'} (2.5)"
        in stdout
    )
    assert "a.jsonl" not in stdout


def test_bad_rows_end_with_2_and_no_output(folder: Path):
    source = write_rows(folder / "a.jsonl", [ask(0), ask(0), {"id": 5}])
    code, stdout, stderr = run(source, "--output", folder / "b.jsonl", "--quiet")
    assert (code, stdout) == (2, "")
    assert f"{source}:2: " in stderr and f"{source}:3: " in stderr
    assert not (folder / "b.jsonl").exists()


def test_several_files_become_one(folder: Path):
    first = write_rows(folder / "a.jsonl", [ask(0)])
    second = write_rows(folder / "c.jsonl", [ask(1)])
    code, _, _ = run(first, second, "--output", folder / "b.jsonl")
    assert code == 0
    loaded, _ = load_conversations([folder / "b.jsonl"])
    assert [c.id for c in loaded] == ["row-0", "row-1"]


def test_columns_and_the_prompt_are_taken_from_the_settings(folder: Path):
    (folder / "in").mkdir()
    rows = [{"bild": "red.png", "text_de": "rot"}]
    source = write_rows(folder / "in" / "t.jsonl", rows)
    columns = ("columns.image=bild", "columns.caption=text_de")
    settings = (*columns, "prompt=Was?", f"image_dir={folder}", "format=table")
    code, _, stderr = run(settings[0], source, "--output", folder / "b.jsonl", *settings[1:])
    assert code == 0, stderr
    [conversation], _ = load_conversations([folder / "b.jsonl"])
    assert [turn.text for turn in conversation.turns] == ["Was?", "rot"]
    assert conversation.images[0].ref == "red.png"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("format=sharegtp",), "did you mean 'sharegpt'?"),
        (("formt=sharegpt",), "unknown key 'formt'; did you mean 'format'?"),
        (("data.on_bad_sampel=skip",), "did you mean 'data.on_bad_sample'?"),
        (("columns.imge=a",), "did you mean 'image'?"),
        (("columns=image",), "expected: a mapping"),
        (("image_dir=nowhere",), "no such folder of pictures"),
        (("data.train=hub:a/b",), "data.train is set"),
        (("data.max_bad_fraction=1",), "no effect because data.on_bad_sample is error"),
        (("--of", "eval"), "data.eval is not given"),
    ],
)
def test_settings_that_cannot_be_are_named(folder: Path, options: tuple[str, ...], expected: str):
    source = write_rows(folder / "a.jsonl", [ask(0)])
    code, _, stderr = run(source, "--output", folder / "b.jsonl", *options)
    assert code == 2
    assert expected in stderr
    assert not (folder / "b.jsonl").exists()


def test_missing_data_is_named(folder: Path):
    code, _, stderr = run(folder / "gone.jsonl", "--output", folder / "b.jsonl")
    assert code == 2 and "gone.jsonl" in stderr


def test_a_recipe_gives_its_own_data(folder: Path):
    write_rows(folder / "a.jsonl", [ask(0)])
    write_rows(folder / "e.jsonl", [ask(1)])
    recipe = write_recipe(folder, "{train: a.jsonl, eval: e.jsonl}")
    assert run(recipe, "--output", folder / "b.jsonl")[0] == 0
    assert run(recipe, "--of", "eval", "--output", folder / "c.jsonl")[0] == 0
    ids = [load_conversations([folder / name])[0][0].id for name in ("b.jsonl", "c.jsonl")]
    assert ids == ["row-0", "row-1"]


def test_a_recipe_takes_its_own_keys_and_no_other_files(folder: Path):
    write_rows(folder / "a.jsonl", [ask(0), ask(1, "gone.png")])
    recipe = write_recipe(folder, "{train: a.jsonl}")
    code, _, stderr = run(recipe, "format=messages", "--output", folder / "b.jsonl")
    assert code == 2 and "no effect with a recipe; got: format=messages" in stderr
    code, _, stderr = run(recipe, folder / "a.jsonl", "--output", folder / "b.jsonl")
    assert code == 2 and "a recipe is given together with other files" in stderr
    code, _, _ = run(recipe, "data.on_bad_sample=skip", "--output", folder / "b.jsonl")
    assert code == 0
    code, _, stderr = run(recipe, "--of", "eval", "--output", folder / "c.jsonl")
    assert code == 2 and "data.eval" in stderr


def test_an_output_that_is_there_is_kept(folder: Path):
    source = write_rows(folder / "a.jsonl", [ask(0)])
    (folder / "b.jsonl").write_text("mine")
    code, _, stderr = run(source, "--output", folder / "b.jsonl")
    assert code == 2 and "--overwrite" in stderr
    assert (folder / "b.jsonl").read_text() == "mine"
    assert run(source, "--output", folder / "b.jsonl", "--overwrite")[0] == 0


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(folder: Path):
    """A real process: 3,000 rows of base64, interrupted once some of them are on the disk."""
    picture = base64.b64encode((folder / "red.png").read_bytes()).decode()
    source = write_rows(
        folder / "a.jsonl", [ask(n, f"data:image/png;base64,{picture}") for n in range(3000)]
    )
    assert run(source, "--output", folder / "whole" / "b.jsonl", "--quiet")[0] == 0
    output = folder / "stopped" / "b.jsonl"
    slow = (
        "import time, vlmtune.data.tools.convert as c\n"
        "c.SAVE_SECONDS = 0.05\n"
        "row_of = c.row_of\n"
        "c.row_of = lambda *a: (time.sleep(0.002), row_of(*a))[1]\n"
        "from vlmtune.cli.app import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", slow, "data", "convert", str(source), "--output", str(output)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hears_ctrl_c,
        text=True,
    )
    state = output.with_name("b.jsonl.state.json")
    deadline = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "run the same command again" in stderr and "Traceback" not in stderr
    code, stdout, _ = run(source, "--output", output, "--json")
    assert code == 0
    assert 0 < json.loads(stdout)["went_on_from_row"] < 3000
    assert output.read_bytes() == (folder / "whole" / "b.jsonl").read_bytes()


def test_a_table_of_text_is_converted(folder: Path):
    """From a file that is no JSON at all, where such files are read."""
    path = folder / "t.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["image", "caption"], ["red.png", "A red,\nlong one"]])
    code, _, stderr = run(path, "--output", folder / "b.jsonl")
    assert code == 0, stderr
    [conversation], _ = load_conversations([folder / "b.jsonl"])
    assert conversation.turns[-1].text == "A red,\nlong one"
