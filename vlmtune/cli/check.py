"""`vlmtune check RECIPE`: everything that can go wrong with a run, before it costs anything."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from vlmtune.cli.common import (
    DebugOption,
    JsonOption,
    OverridesArgument,
    QuietOption,
    RecipeArgument,
    command,
    print_json,
)
from vlmtune.errors import CheckFailed

WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        metavar="N",
        help="Processes that look at rows; 0: this one. Default: as many as there are cores.",
        show_default=False,
    ),
]
MaxSamplesOption = Annotated[
    int | None,
    typer.Option(
        "--max-samples",
        min=1,
        metavar="N",
        help="Look at so many rows of each set, from all over it, and say so. Default: at all.",
        show_default=False,
    ),
]


@command
def check_command(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    workers: WorkersOption = None,
    max_samples: MaxSamplesOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a recipe and every sample on the CPU, without loading a weight; exit 1: not ready."""
    from vlmtune.recipe.load import load_recipe
    from vlmtune.sessions.console import progress
    from vlmtune.sessions.preload import preload

    loaded = load_recipe(recipe, overrides or ())
    # Only now: the start of torch and transformers takes seconds, a wrong recipe none.
    preload("vlmtune.preflight.run")
    from vlmtune.cli.check_output import print_report
    from vlmtune.preflight.run import Preflight
    from vlmtune.preflight.summary import summary_of

    show = functools.partial(progress, quiet=quiet)
    report = Preflight(loaded, workers, max_samples, show_progress=show).run()
    summary = summary_of(report)
    if json:
        print_json(summary)
    else:
        print_report(report, summary)
    if report.problems.verdict == "not_ready":
        raise typer.Exit(CheckFailed.exit_code)
