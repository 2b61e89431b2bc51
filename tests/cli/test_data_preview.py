"""`vlmtune data preview`: which samples, and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmtune.cli.app import app
from vlmtune.errors import escaped


def run(*arguments: object, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    result = CliRunner(env=env).invoke(app, ["data", "preview", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def data(sample_data: Path) -> Path:
    return sample_data / "eval.jsonl"


@pytest.fixture
def common(data: Path, tiny_vlm: Path) -> tuple[object, ...]:
    return data, "--model", tiny_vlm, "--quiet"


def test_supervised_text_stands_between_marks_in_a_pipe(common: tuple[object, ...]):
    code, stdout, _ = run(*common, "--ids", "eval-001")
    assert code == 0
    assert stdout.count("⟦") == stdout.count("⟧") == 1
    assert "⟦two<|im_end|>⟧" in stdout
    assert "<|vision_start|><|image_pad|> x 16<|vision_end|>Which drawer is this for?" in stdout
    assert "picture 1: 64 x 64 -> 64 x 64, 16 tokens" in stdout
    assert "36 tokens, 16 of them for media, 2 supervised" in stdout
    assert "\x1b" not in stdout


def test_colour_takes_the_place_of_marks_unless_it_is_not_wanted(common: tuple[object, ...]):
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    _, stdout, _ = run(*common, "--ids", "eval-001", env=terminal)
    assert "⟦" not in stdout and "\x1b[1;32mtwo<|im_end|>" in stdout
    _, stdout, _ = run(*common, "--ids", "eval-001", env=terminal | {"NO_COLOR": "1"})
    assert "⟦two<|im_end|>⟧" in stdout and "\x1b[1;32m" not in stdout


def test_samples_are_chosen_evenly_or_by_seed(common: tuple[object, ...], data: Path):
    names = [json.loads(line)["id"] for line in data.read_text().splitlines()]

    def shown(*options: object) -> list[str]:
        code, stdout, _ = run(*common, "--json", *options)
        assert code == 0
        return [sample["id"] for sample in json.loads(stdout)["samples"]]

    last = len(names) - 1
    assert shown() == [names[0], names[last // 2], names[last]]
    assert shown("-n", 1) == [names[0]]
    first = shown("--seed", 1, "-n", 5)
    assert first == shown("--seed", 1, "-n", 5) and len(set(first)) == 5
    assert first != shown("--seed", 2, "-n", 5)
    assert shown("--ids", names[4], "--ids", names[2]) == [names[2], names[4]]


def test_an_unknown_id_is_named(common: tuple[object, ...]):
    code, _, stderr = run(*common, "--ids", "nobody")
    assert code == 2 and "nobody" in stderr


def test_a_model_is_needed(data: Path):
    code, _, stderr = run(data)
    assert code == 2 and "--model" in stderr


def test_empty_names_are_refused(data: Path):
    for arguments in (("", "--model", "x"), (data, "--model", "")):
        code, _, stderr = run(*arguments)
        assert code == 2 and "empty" in stderr


def test_a_recipe_brings_its_model_and_settings(root: Path):
    recipe = root / "configs" / "quickstart.yaml"
    code, stdout, _ = run(recipe, "data.train_on=last_turn", "-n", 1, "--json", "--quiet")
    assert code == 0
    assert json.loads(stdout)["samples"][0]["pictures"]
    code, _, stderr = run(recipe, "data.max_tokens=8", "-n", 1, "--quiet")
    assert code == 2 and "max_tokens" in stderr and "train.jsonl:1" in stderr


def test_files_take_the_settings_of_a_recipe(common: tuple[object, ...]):
    code, _, stderr = run(*common, "data.max_tokens=8")
    assert code == 2 and "max_tokens" in stderr and "eval.jsonl:1" in stderr
    _, whole, _ = run(*common, "--ids", "eval-001")
    _, halved, _ = run(*common, "--ids", "eval-001", "image.max_pixels=1024")
    assert "picture 1: 64 x 64 -> 64 x 64, 16 tokens" in whole
    assert "picture 1: 64 x 64 -> 32 x 32, 4 tokens" in halved


def test_bad_rows_stop_it_or_are_named(tmp_path: Path, tiny_vlm: Path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    path.write_text(json.dumps({"id": "x"}) + "\n" + json.dumps({"messages": turns}) + "\n")
    code, _, stderr = run(path, "--model", tiny_vlm, "--quiet")
    assert code == 2 and f"{path}:1: " in stderr
    code, stdout, stderr = run(path, "--model", tiny_vlm, "--quiet", "data.on_bad_sample=skip")
    assert code == 0 and f"left out: {path}:1: " in stderr and "⟦Yo<|im_end|>⟧" in stdout


def test_a_page_is_written_beside(common: tuple[object, ...], tmp_path: Path):
    code, stdout, _ = run(*common, "-n", 2, "--html", tmp_path / "p.html")
    assert code == 0 and stdout.splitlines()[-1] == str(tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text("utf-8")
    assert page.count("<article") == 2 and page.count("<img") == 2


def test_characters_that_a_terminal_obeys_are_shown_as_escapes():
    assert escaped("a\x1b[31mb\r\n\tc\u202e é") == "a\\x1b[31mb\\r\n\tc\\u202e é"
