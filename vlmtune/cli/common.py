"""What every command shares: options, logging, errors to exit codes, JSON on stdout.

Results go to stdout, everything else to stderr. Imports no torch: `vlmtune --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json as jsonlib
import logging
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from vlmtune.errors import VlmtuneError

INTERRUPTED = 130

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Only warnings and errors on stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.SUB=VALUE]...",
        help="Recipe keys set on the command line; the value is YAML. "
        "`null` takes a key out where it is no value.",
        show_default=False,
    ),
]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose `VlmtuneError`s become a message on stderr and an exit code.

    `function` must take `quiet: QuietOption` and `debug: DebugOption`. Raises `typer.Exit` with
    the error's `exit_code`, or 130 on Ctrl-C; any other exception is our bug and passes through.
    """
    missing = {"quiet", "debug"} - set(inspect.signature(function).parameters)
    assert not missing, f"{function.__name__} lacks the common options {sorted(missing)}"

    @functools.wraps(function)
    def run(*args: object, quiet: bool, debug: bool, **kwargs: object) -> None:
        setup_logging(quiet)
        try:
            function(*args, quiet=quiet, debug=debug, **kwargs)
        except VlmtuneError as error:
            if debug:
                traceback.print_exc(file=sys.stderr)
            print(error, file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            if debug:
                traceback.print_exc(file=sys.stderr)
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return run


def setup_logging(quiet: bool) -> None:
    """Notices of all layers, logged to `vlmtune`, go to stderr as plain lines."""
    logger = logging.getLogger("vlmtune")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers = [handler]  # one handler, also when a process runs several commands
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


def print_json(result: object) -> None:
    """Print `result` (mappings, sequences, dataclasses, paths, numbers) as one JSON object.

    JSON has no infinities and no NaN: they become null.
    """
    print(jsonlib.dumps(_plain(result), indent=2, allow_nan=False))


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
