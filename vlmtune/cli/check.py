"""`vlmtune check RECIPE`: everything that can go wrong with a run, before it costs anything."""

from __future__ import annotations

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
    print_json,
)
from vlmtune.errors import CheckFailed, plural

if TYPE_CHECKING:
    from rich.console import Console

    from vlmtune.preflight.problems import Problem, ProblemKind
    from vlmtune.preflight.summary import CheckSummary, SetSummary

SHOWN_PER_KIND = 20
VERDICTS = {
    "ready": ("ready", "bold green"),
    "warnings": ("ready with warnings", "bold yellow"),
    "not_ready": ("not ready", "bold red"),
}

WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        metavar="N",
        help="Number of processes that read rows; 0: none besides this one. Default: one per core.",
        show_default=False,
    ),
]
MaxSamplesOption = Annotated[
    int | None,
    typer.Option(
        "--max-samples",
        min=1,
        metavar="N",
        help="Check only N rows of each set, spread evenly over it. Default: all rows.",
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
    """Check a recipe and every sample on the CPU, without loading weights; exit 1: not ready."""
    from vlmtune.recipe.load import load_recipe
    from vlmtune.sessions.preload import preload

    loaded = load_recipe(recipe, overrides or ())
    # Only now: the start of torch and transformers takes seconds, a wrong recipe none.
    preload("vlmtune.sessions.check")
    from vlmtune.sessions.check import check

    summary = check(loaded, workers=workers, max_samples=max_samples, quiet=quiet)
    if json:
        print_json(summary)
    else:
        print_summary(summary)
    if summary.verdict == "not_ready":
        raise typer.Exit(CheckFailed.exit_code)


def print_summary(summary: CheckSummary) -> None:
    """Print what a check found: problems by kind, one table, the verdict last, where the eye is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    problems: dict[tuple[str, str], list[Problem]] = {}
    for problem in summary.problems:
        problems.setdefault((problem.severity, problem.kind), []).append(problem)
    for kind in summary.kinds:
        _print_kind(console, kind, problems.get((kind.severity, kind.kind), []))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _lines(summary):
        table.add_row(name, value)
    console.print(table)
    words, style = VERDICTS[summary.verdict]
    counts = [
        plural(count, name)
        for name, count in (("error", summary.num_errors), ("warning", summary.num_warnings))
        if count
    ]
    end = f" ({', '.join(counts)})" if counts else ""
    console.print(Text(words, style=style) + Text(end))


def _print_kind(console: Console, kind: ProblemKind, problems: list[Problem]) -> None:
    from rich.text import Text

    start = Text(f"{kind.severity}: ", style="red" if kind.severity == "error" else "yellow")
    for problem in problems[:SHOWN_PER_KIND]:
        place = f"{problem.place}: " if problem.place else ""
        console.print(start + Text(place + problem.message))
    more = kind.count - min(len(problems), SHOWN_PER_KIND)
    if more:
        console.print(start + Text(f"and {more:,} more like it"))


def _lines(summary: CheckSummary) -> list[tuple[str, str]]:
    from vlmtune.preflight.epoch_stats import format_bytes

    lines = [(str(name), _describe_set(found)) for name, found in summary.sets.items()]
    for name, found in summary.sets.items():
        for what, counts in (("left out of", found.dropped), ("changed in", found.changed)):
            texts = [f"{count:,} {reason}" for reason, count in counts.items()]
            if texts:
                lines.append((f"{what} {name}", "; ".join(texts)))
    if (epoch := summary.epoch) is not None and summary.run is not None:
        epochs = f"{summary.epochs:.3g} {'epoch' if summary.epochs == 1 else 'epochs'}"
        steps = plural(summary.steps or 0, "step")
        lines.append(("an epoch", f"{plural(epoch.steps, 'step')}: {_counts(vars(epoch))}"))
        lines.append(("the run", f"{steps}, {epochs}: {_counts(summary.run)}"))
    if summary.method is not None:
        parts = [
            f"{part} {count.trainable_parameters:,}"
            for part, count in summary.parts.items()
            if count.trainable_parameters
        ]
        total = f"{summary.trainable_parameters:,}"
        lines.append(("trained parameters", f"{total} ({summary.method}): {', '.join(parts)}"))
    if summary.memory is not None:
        parts = [f"{k} {format_bytes(v)}" for k, v in vars(summary.memory).items() if v]
        total = format_bytes(summary.memory.total)
        lines.append(("memory, estimated", f"{total}: {', '.join(parts)}"))
    if (disk := summary.disk) is not None:
        text = f"{format_bytes(disk.needed_bytes)} of {format_bytes(disk.free_bytes)} free"
        checkpoints = plural(disk.checkpoints, "checkpoint")
        text += f": {checkpoints} of {format_bytes(disk.checkpoint_bytes)}, result"
        if disk.cache_bytes:
            text += f"; sample cache about {format_bytes(disk.cache_bytes)}"
        lines.append(("disk", text))
    return lines


def _describe_set(found: SetSummary) -> str:
    text = f"{found.samples:,} of {plural(found.rows_looked_at, 'row')} usable"
    if found.rows_looked_at < found.rows:
        text += f" (of {found.rows:,} in all)"
    text += f": {_counts(vars(found))}"
    if spread := found.tokens_per_sample:
        text += f"; tokens per sample: median {spread['p50']:,}, longest {spread['p100']:,}"
    formats = sorted(set(found.files.values()))
    return text + (f"; format {', '.join(formats)}" if formats else "")


def _counts(found: Mapping[str, int]) -> str:
    return (
        f"{plural(found['tokens'], 'token')}, {found['supervised_tokens']:,} supervised, "
        f"{plural(found['images'], 'picture')} in {plural(found['image_tokens'], 'token')}"
    )
