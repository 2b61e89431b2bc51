"""The command line as a whole: help, version, usage errors, exit codes, what goes to stdout."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from vlmtune import __version__
from vlmtune.cli.app import app
from vlmtune.cli.common import DebugOption, JsonOption, QuietOption, command, print_json
from vlmtune.errors import CheckFailed, ErrorGroup, VlmtuneError

HEAVY = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
NOT_FOR_HELP = (*HEAVY, "pydantic", "yaml", "rich")


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def one_command_app(body: object) -> typer.Typer:
    """A command line whose one command calls `body`."""
    own = typer.Typer()

    @own.command()
    @command
    def only(
        json: JsonOption = False, quiet: QuietOption = False, debug: DebugOption = False
    ) -> None:
        assert callable(body)
        body()

    return own


def raising(error: BaseException) -> typer.Typer:
    def body() -> None:
        raise error

    return one_command_app(body)


def test_version() -> None:
    assert run("--version") == (0, f"vlmtune {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [(["--help"], NOT_FOR_HELP), (["train", "--help"], HEAVY), (["recipe", "--help"], HEAVY)],
)
def test_help_imports_nothing_heavy(arguments: list[str], heavy: tuple[str, ...]) -> None:
    code = f"""
import sys
from vlmtune.cli.app import app
app({arguments!r}, standalone_mode=False)
loaded = set({heavy!r}) & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def test_the_check_for_heavy_imports_sees_one() -> None:
    code = f"import vlmtune.recipe.load, sys; assert not set({NOT_FOR_HELP!r}) & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 1


@pytest.mark.parametrize("name", ["train", "eval", "chat", "recipe show", "recipe schema"])
def test_every_command_takes_the_common_options(name: str) -> None:
    code, out, _ = run(*name.split(), "--help")
    assert code == 0
    for option in ("--json", "--quiet", "--debug"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["recipe", "shwo"], "Did you mean 'show'?"),
        (["qqq"], "No such command 'qqq'"),
        (["recipe", "show"], "Missing argument 'RECIPE'"),
        (["recipe", "show", "r.yaml", "--jsn"], "No such option"),
        (["eval", "somewhere"], "do: name a file with --data"),
        ([], "Usage: "),
    ],
)
def test_bad_usage_exits_2(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert expected in result.output


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (VlmtuneError("wrong", file="a.yaml", line=3), 2, "a.yaml:3: wrong\n"),
        (ErrorGroup([VlmtuneError("one"), VlmtuneError("two")]), 2, "one\ntwo\n"),
        (CheckFailed("no"), 1, "no\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_a_message_and_an_exit_code(
    error: BaseException, code: int, message: str
) -> None:
    result = CliRunner().invoke(raising(error), [])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", message)
    with_traceback = CliRunner().invoke(raising(error), ["--debug"])
    assert with_traceback.exit_code == code
    assert "Traceback" in with_traceback.stderr
    assert with_traceback.stderr.endswith(message)


def test_our_own_bugs_keep_their_traceback() -> None:
    result = CliRunner().invoke(raising(ZeroDivisionError("ours")), [])
    assert isinstance(result.exception, ZeroDivisionError)


def test_only_the_json_object_reaches_stdout() -> None:
    def body() -> None:
        print("a library talks")
        print_json({"path": Path("a/b"), "loss": float("nan"), "steps": (1, 2)})

    result = CliRunner().invoke(one_command_app(body), ["--json"])
    assert json.loads(result.stdout) == {"path": "a/b", "loss": None, "steps": [1, 2]}
    assert result.stderr == "a library talks\n"
    without = CliRunner().invoke(one_command_app(body), [])
    assert without.stdout.startswith("a library talks")


def test_quiet_keeps_warnings_only() -> None:
    def body() -> None:
        logger = logging.getLogger("vlmtune")
        logger.info("a notice")
        logger.warning("a warning")

    assert CliRunner().invoke(one_command_app(body), []).stderr == "a notice\na warning\n"
    assert CliRunner().invoke(one_command_app(body), ["--quiet"]).stderr == "a warning\n"


def test_command_without_the_common_options_is_refused() -> None:
    def lacks_debug(json: bool, quiet: bool) -> None: ...

    with pytest.raises(AssertionError, match=r"lacks the common options \['debug'\]"):
        command(lacks_debug)
