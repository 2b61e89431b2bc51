"""`vlmtune train RECIPE`: the main job, on one device or under `accelerate launch`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmtune.cli.common import (
    DebugOption,
    JsonOption,
    OverridesArgument,
    QuietOption,
    RecipeArgument,
    command,
    print_json,
    setup_logging,
)
from vlmtune.errors import CheckFailed, plural

if TYPE_CHECKING:
    pass


def print_summary(summary: dict[str, Any]) -> None:
    if summary["stopped_by"] is not None:
        print(
            f"stopped after step {summary['steps']}; a checkpoint is in {summary['run']}; "
            "go on with --resume auto",
            file=sys.stderr,
        )
        return
    lines = []
    if summary["trainable_parameters"] is None:
        print(f"already finished: {summary['result']}", file=sys.stderr)
    else:
        loss = "" if summary["loss"] is None else f", loss {summary['loss']:.4f}"
        lines = [f"{summary['result']}: {plural(summary['steps'], 'step')}{loss}"]
    if summary["best"] is not None:
        best = summary["best"]
        lines.append(f"the result is step {best['step']}'s: {best['metric']} {best['value']:.4f}")
    if summary["skipped"]:
        lines.append(
            f"{plural(summary['skipped'], 'sample was', 'samples were')} not trained on: see "
            f"{summary['run'] / 'skipped.jsonl'}"
        )
    if summary["vision_cache"] is not None:
        lines.append(_cache_line(summary["vision_cache"]))
    lines += [
        f"{plural(count, 'sample')}: {note}" for note, count in sorted(summary["notes"].items())
    ]
    if summary["guard"] is not None:
        guard = summary["guard"]
        verdict = "forgotten: the guard's" if guard["has_fallen"] else "the guard's"
        lines.append(
            f"{verdict} {guard['metric']} went from {guard['before']:.4f} to {guard['after']:.4f}, "
            f"allowed is a drop of {guard['max_drop']:g}"
        )
    for line in lines:
        print(line)


def _cache_line(figures: dict[str, int]) -> str:
    sizes = [
        f"{figures[name] / 1e6:,.1f} MB {where}"
        for name, where in (("memory_bytes", "in memory"), ("disk_bytes", "on disk"))
        if name in figures
    ]
    left = f", {figures['not_kept']:,} not kept for want of room" if figures["not_kept"] else ""
    return (
        f"vision cache: {plural(figures['misses'], 'picture')} went through the tower, "
        f"{plural(figures['hits'], 'time')} one was kept ({', '.join(sizes)}{left})"
    )


ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="auto|never|DIR",
        help="auto: go on from the newest complete checkpoint, or start. never: start over; an old "
        "run is renamed. DIR: go on from this checkpoint. Not given: the folder must be free, or "
        "of a run that ended before its first checkpoint.",
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

    is_main = os.environ.get("RANK", "0") == "0"
    quiet = quiet or not is_main
    setup_logging(quiet)
    loaded = load_recipe(recipe, overrides or ())
    # Only now: the start of torch and transformers takes seconds, a wrong recipe none.
    preload("vlmtune.sessions.train")
    from vlmtune.sessions.train import Session
    from vlmtune.train.run_folder import choose_start
    from vlmtune.train.runtime import build_accelerator, joined

    start = choose_start(Path(loaded.recipe.output_dir), resume)
    with joined(build_accelerator(loaded.recipe.train.precision)) as accelerator:
        accelerator.wait_for_everyone()  # all have looked at the folder before one writes to it
        session = Session(loaded, accelerator, resume, quiet)
        summary = session.run(start)
    if is_main and json:
        print_json(summary)
    elif not quiet:
        print_summary(summary)
    if summary["stopped_by"] is not None:
        raise typer.Exit(summary["stopped_by"])
    if summary["guard"] is not None and summary["guard"]["has_fallen"]:
        raise typer.Exit(CheckFailed.exit_code)
