"""`vlmtune train RECIPE`: the main job, on one device or under `accelerate launch`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from vlmtune.cli.common import (
    DebugOption,
    JsonOption,
    OverridesArgument,
    QuietOption,
    RecipeArgument,
    command,
    is_main_process,
    print_json,
    setup_logging,
)
from vlmtune.errors import CheckFailed, plural

if TYPE_CHECKING:
    from vlmtune.sessions.train import TrainSummary


def print_summary(summary: TrainSummary) -> None:
    if summary.stopped_by is not None:
        print(
            f"stopped after step {summary.steps}; a checkpoint is in {summary.run}; "
            "continue with --resume auto",
            file=sys.stderr,
        )
        return
    lines = []
    if summary.trainable_parameters is None:
        print(f"already finished: {summary.result}", file=sys.stderr)
    else:
        loss = "" if summary.loss is None else f", loss {summary.loss:.4f}"
        lines = [f"{summary.result}: {plural(summary.steps, 'step')}{loss}"]
    if (best := summary.best) is not None:
        lines.append(f"the result is from step {best.step}: {best.metric} {best.value:.4f}")
    if summary.skipped:
        lines.append(
            f"{plural(summary.skipped, 'sample was', 'samples were')} not trained on: see "
            f"{summary.run / 'skipped.jsonl'}"
        )
    if summary.vision_cache is not None:
        lines.append(_cache_line(summary.vision_cache))
    lines += [f"{plural(count, 'sample')}: {note}" for note, count in sorted(summary.notes.items())]
    if summary.guard is not None:
        lines.append(str(summary.guard))
    for line in lines:
        print(line)


def _cache_line(figures: Mapping[str, int]) -> str:
    sizes = [
        f"{figures[name] / 1e6:,.1f} MB {where}"
        for name, where in (("memory_bytes", "in memory"), ("disk_bytes", "on disk"))
        if name in figures
    ]
    full = f"; {figures['not_kept']:,} did not fit" if figures["not_kept"] else ""
    return (
        f"vision cache: {plural(figures['misses'], 'picture')} encoded, "
        f"{plural(figures['hits'], 'cache hit')} ({', '.join(sizes)}{full})"
    )


ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="auto|never|DIR",
        help="auto: continue from the newest complete checkpoint, or start if there is none. "
        "never: start over; the old run is renamed. DIR: continue from this checkpoint. "
        "Default: start; the output folder must not hold a checkpoint or a result.",
        show_default=False,
    ),
]


@command
def train_command(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    resume: ResumeOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a model from a recipe into the folder `output_dir`."""
    from vlmtune.recipe.load import load_recipe
    from vlmtune.sessions.preload import preload

    quiet = quiet or not is_main_process()
    setup_logging(quiet)
    loaded = load_recipe(recipe, overrides or ())
    # Only now: the start of torch and transformers takes seconds, a wrong recipe none.
    preload("vlmtune.sessions.train")
    from vlmtune.sessions.train import train

    summary = train(loaded, resume=resume, quiet=quiet)
    if json and is_main_process():
        print_json(summary)
    elif not quiet:
        print_summary(summary)
    if summary.stopped_by is not None:
        raise typer.Exit(summary.stopped_by)
    if summary.guard is not None and summary.guard.has_fallen:
        raise typer.Exit(CheckFailed.exit_code)
