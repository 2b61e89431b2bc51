from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmtune.cli.app import app

SHORT = ("eval.max_new_tokens=4",)


def run(*arguments: object, typed: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["chat", *map(str, arguments)], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def picture(sample_data: Path) -> Path:
    return sample_data / "images" / "eval-000.png"


def test_a_question_is_answered_once_in_words_or_json(tiny_vlm: Path, picture: Path) -> None:
    asked = (tiny_vlm, "--image", picture, "What color is it?", *SHORT)
    code, stdout, _ = run(*asked)
    assert code == 0
    as_json = run(*asked, "--json")
    assert as_json[0] == 0
    assert json.loads(as_json[1]) == {"answer": stdout.strip()}
    assert stdout.strip()


def test_a_conversation_goes_on_after_mistakes(tiny_vlm: Path, picture: Path) -> None:
    lines = [
        "/image missing.png",
        "/image",
        "/nonsense",
        "What color is it?",
        "",
        f"/image {picture}",
        "/reset",
        "What color is it?",
        "/quit",
        "never asked",
    ]
    code, stdout, stderr = run(tiny_vlm, *SHORT, typed="\n".join(lines) + "\n")
    assert code == 0
    for said in ("missing.png", "/image needs a path", "unknown command /nonsense", "forgotten"):
        assert said in stderr
    assert "/reset" in stderr  # the known commands are listed
    answers = stdout.splitlines()
    assert len(answers) == 2
    assert answers[0] == answers[1] != ""  # the same question after a reset, without the picture


def test_the_end_of_input_ends_the_conversation(tiny_vlm: Path) -> None:
    code, stdout, stderr = run(tiny_vlm, *SHORT, "--quiet", typed="")
    assert (code, stdout, stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--json"], "--json needs a question"),
        (["  "], "the question is empty"),
        (["--image", "missing.png", "What?"], "missing.png: no such picture file"),
        (["What?"], "missing-model"),
        (["What?", "And?"], "expected: TARGET, or TARGET QUESTION"),
        (["What?", "eval.max_new_token=4"], "did you mean 'eval.max_new_tokens'?"),
        (["What?", "eval.decoding.method=beam"], "eval.decoding.method has no effect"),
        (["What?", "quantization_bit=5"], "expected: one of 4, 8, 16"),
    ],
)
def test_wrong_input_ends_with_2(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = run("./missing-model", *arguments)
    assert code == 2
    assert stdout == ""
    assert expected in stderr
