"""An evaluation and a comparison as tables, on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from vlmtune.errors import plural, shorten

if TYPE_CHECKING:
    from vlmtune.evaluation.metrics.base import Interval
    from vlmtune.sessions.evaluate import ComparisonResult, EvalResult, Figures

CHANGES_SHOWN = 5
PIPE_COLUMNS = 120


def print_result(result: EvalResult) -> None:
    """The figures of one evaluation, a row for each metric of all samples and of each question
    type, and where its predictions are."""
    blind = result.blind or {}
    table = Table(title=f"{result.task}, {plural(result.num_samples, 'sample')}")
    table.add_column("question type")
    table.add_column("metric")
    for heading in ("value", "95 % interval", "n", *(name.replace("_", " ") for name in blind)):
        table.add_column(heading, justify="right")
    for kind in (None, *result.slices):
        for name, interval in _metrics_of(result, kind).items():
            guesses = [_metrics_of(guesser, kind).get(name) for guesser in blind.values()]
            table.add_row(
                "all" if kind is None else kind,
                name,
                format_figure(name, interval.value),
                format_interval(name, interval.low, interval.high),
                str(interval.count),
                *("" if guess is None else format_figure(name, guess.value) for guess in guesses),
            )
    _print(table)
    if result.guard is not None:
        print(result.guard)
    print(f"predictions: {result.predictions}")


def _metrics_of(figures: EvalResult | Figures, kind: str | None) -> Mapping[str, Interval]:
    return figures.metrics if kind is None else figures.slices.get(kind, {})


def print_comparison(result: ComparisonResult) -> None:
    """Each target's figures, their differences from the first's, and some samples that changed."""
    for one in result.targets:
        print(one.target)
        print_result(one)
    summary = result.comparison
    assert summary is not None
    table = Table(title=f"compared with {summary.against}")
    table.add_column("metric")
    table.add_column("target", overflow="fold")
    for heading in ("value", "difference", "95 % interval", "right→wrong", "wrong→right"):
        table.add_column(heading, justify="right")
    table.add_column("McNemar p", justify="right")
    # A metric need not be defined for every target (precision without a positive answer).
    of_first = {name: d for c in reversed(summary.comparisons) for name, d in c.metrics.items()}
    for name, own in of_first.items():
        table.add_row(name, summary.against, format_figure(name, own.first))
        for comparison in summary.comparisons:
            found, test = comparison.metrics.get(name), comparison.mcnemar.get(name)
            if found is None:
                continue
            tested = (
                ()
                if test is None
                else (
                    str(test.right_to_wrong),
                    str(test.wrong_to_right),
                    format_p_value(test.p_value),
                )
            )
            table.add_row(
                name,
                comparison.target,
                format_figure(name, found.value),
                format_figure(name, found.difference, signed=True),
                format_interval(name, found.low, found.high, signed=True),
                *tested,
            )
    _print(table)
    # Not splitlines: an answer may hold a character that Unicode counts as the end of a line.
    lines = summary.changes.read_text(encoding="utf-8").split("\n")
    for line in change_lines([json.loads(line) for line in lines if line]):
        print(line)
    print(f"comparison: {summary.changes.parent}")


def change_lines(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first few rows of `changes.jsonl` that got worse, then of those that got better."""
    lines = []
    for kinds in (("right_to_wrong", "worse"), ("wrong_to_right", "better")):
        found = [row for row in changes if set(kinds) & set(row["changes"].values())]
        for row in found[:CHANGES_SHOWN]:
            kind = next(kind for kind in row["changes"].values() if kind in kinds)
            answers = ", ".join(
                f"{name}: {shorten(text, 40)!r}" for name, text in row["predictions"].items()
            )
            wanted = row["answer"] if row["answer"] is not None else ", ".join(row["answers"][:3])
            lines.append(
                f"{kind.replace('_', ' ')}: {row['id']}: {shorten(row['question'], 60)!r} "
                f"({shorten(wanted, 40)!r}) {answers}"
            )
        if len(found) > CHANGES_SHOWN:
            lines.append(f"… and {len(found) - CHANGES_SHOWN} more")
    return lines


def format_figure(name: str, value: float, *, signed: bool = False) -> str:
    """A figure in per cent where it is a fraction, else as it is."""
    from vlmtune.evaluation.metrics.registry import is_fraction

    sign = "+" if signed else ""
    return f"{100 * value:{sign}.2f} %" if is_fraction(name) else f"{value:{sign}.3f}"


def format_interval(name: str, low: float, high: float, *, signed: bool = False) -> str:
    ends = [format_figure(name, end, signed=signed).removesuffix(" %") for end in (low, high)]
    return " to ".join(ends)


def format_p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _print(table: Table) -> None:
    """On stdout; in a pipe, where nobody says how wide it is, wide enough not to be wrapped. A
    question type or a path with brackets is shown as it is, not taken for a style."""
    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    Console(width=width, markup=False, emoji=False).print(table)
