"""What every command shares: options, logging, errors to exit codes, JSON on stdout.

Results go to stdout, everything else to stderr. Imports no torch: `vlmtune --help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json as jsonlib
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Literal, TextIO

import typer

from vlmtune.errors import CheckFailed, SampleError, VlmtuneError

DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        "--dtype", help="auto: bfloat16 if the device computes in it natively, else float32."
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code from the model's repository.")
]

INTERRUPTED = 130

_json_stream: ContextVar[TextIO | None] = ContextVar("_json_stream", default=None)
"""Where the JSON object goes while a command's stdout is led to stderr; None: stdout."""

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", help="Print only warnings and errors on stderr.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY.SUB=VALUE",
        help="Recipe keys to set; VALUE is YAML. `null` removes a key that cannot be null.",
        show_default=False,
    ),
]

_SETTING = re.compile(r"\w+(\.\w+)*=")


def split_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(paths, settings) of arguments in any order. `word[.word…]=value` is a setting, unless a
    file of that name, or one that matches it as a pattern, exists."""
    from vlmtune.recipe.paths import expand_shards

    def is_setting(argument: str) -> bool:
        if _SETTING.match(argument) is None:
            return False
        return not any(map(os.path.lexists, expand_shards(argument)))

    settings = [argument for argument in arguments if is_setting(argument)]
    return [argument for argument in arguments if argument not in settings], settings


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose `VlmtuneError`s become a message on stderr and an exit code.

    `function` must take `json: JsonOption`, `quiet: QuietOption` and `debug: DebugOption`. With
    `--json`, whatever a library prints goes to stderr, so that stdout holds the one object that
    `print_json` writes. Raises `typer.Exit` with the error's `exit_code`, or 130 on Ctrl-C; any
    other exception is our bug and passes through.
    """
    missing = {"json", "quiet", "debug"} - set(inspect.signature(function).parameters)
    assert not missing, f"{function.__name__} lacks the common options {sorted(missing)}"

    @functools.wraps(function)
    def run(*args: object, json: bool, quiet: bool, debug: bool, **kwargs: object) -> None:
        setup_logging(quiet)
        try:
            with _only_json_on_stdout() if json else contextlib.nullcontext():
                function(*args, json=json, quiet=quiet, debug=debug, **kwargs)
        except (VlmtuneError, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc(file=sys.stderr)
            if json and isinstance(error, CheckFailed) and error.report is not None:
                print_json(error.report)
            if isinstance(error, VlmtuneError):
                if not _is_reported_elsewhere(error):
                    print(error, file=sys.stderr)
                raise typer.Exit(error.exit_code) from None
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return run


@contextlib.contextmanager
def _only_json_on_stdout() -> Iterator[None]:
    token = _json_stream.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _json_stream.reset(token)


def is_main_process() -> bool:
    """Whether this process prints; known before the processes of a launch meet."""
    return os.environ.get("RANK", "0") == "0"


def _is_reported_elsewhere(error: VlmtuneError) -> bool:
    """Whether the main process of a launch says the same: all of them meet a wrong recipe, one
    alone meets the bad sample of its share."""
    return not is_main_process() and not isinstance(error, SampleError)


def setup_logging(quiet: bool) -> None:
    """Notices of all layers, logged to `vlmtune`, go to stderr as plain lines."""
    logger = logging.getLogger("vlmtune")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]  # one handler, also when a process runs several commands
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    # It asks for a package whose kernel we do not use: see `models/quantize.finish_quantized`.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def print_json(result: object) -> None:
    """Print `result` (mappings, sequences, dataclasses, paths, numbers) as one JSON object.

    JSON has no infinities and no NaN: they become null.
    """
    text = jsonlib.dumps(_plain(result), indent=2, allow_nan=False)
    print(text, file=_json_stream.get() or sys.stdout)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
