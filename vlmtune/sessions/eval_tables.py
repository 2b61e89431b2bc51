"""An evaluation and a comparison as tables, on stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmtune.errors import plural, shorten
from vlmtune.evaluation.compare import Change, Comparison
from vlmtune.evaluation.guard import guard_verdict
from vlmtune.evaluation.metrics.registry import is_fraction

CHANGES_SHOWN = 5
PIPE_COLUMNS = 120
BLIND_COLUMNS = {"majority_answer": "majority answer", "blank_pictures": "blank pictures"}


def print_result(result: Mapping[str, Any]) -> None:
    """The figures of one evaluation (as `--json` has them), a row a question type and metric."""

    blind = result.get("blind", {})
    table = Table(title=f"{result['task']}, {plural(result['num_samples'], 'sample')}")
    table.add_column("question type")
    table.add_column("metric")
    for heading in ("value", "95 % interval", "n", *(BLIND_COLUMNS[name] for name in blind)):
        table.add_column(heading, justify="right")
    for kind in (None, *result["slices"]):
        for name, interval in _figures(result, kind).items():
            guesses = [_figures(guesser, kind).get(name) for guesser in blind.values()]
            table.add_row(
                "all" if kind is None else kind,
                name,
                format_figure(name, interval["value"]),
                format_interval(name, interval),
                str(interval["count"]),
                *(
                    "" if guess is None else format_figure(name, guess["value"])
                    for guess in guesses
                ),
            )
    _print(table)
    if "guard" in result:
        print(guard_line(result["guard"]))


def guard_line(guard: Mapping[str, Any]) -> str:
    """What a verdict (as `--json` has it) says."""

    return str(
        guard_verdict(
            guard["before"], guard["after"], metric=guard["metric"], max_drop=guard["max_drop"]
        )
    )


def print_comparison(comparisons: Sequence[Comparison], changes: Sequence[Change]) -> None:
    """Each target's figures beside the first's, and some of the samples that changed."""

    first = comparisons[0].first
    table = Table(title=f"against {first}")
    table.add_column("metric")
    table.add_column("target", overflow="fold")
    for heading in ("value", "difference", "95 % interval", "right→wrong", "wrong→right"):
        table.add_column(heading, justify="right")
    table.add_column("McNemar p", justify="right")
    # A figure need not be defined for every target (precision without a positive answer).
    figures = {name: d for c in reversed(comparisons) for name, d in c.differences.items()}
    for name, own in figures.items():
        table.add_row(name, first, format_figure(name, own.first))
        for comparison in comparisons:
            found = comparison.differences.get(name)
            if found is None:
                continue
            test = comparison.tests.get(name)
            table.add_row(
                name,
                comparison.target,
                format_figure(name, found.value),
                format_figure(name, found.difference, signed=True),
                format_interval(name, {"low": found.low, "high": found.high}, signed=True),
                *(
                    ("", "", "")
                    if test is None
                    else (
                        str(test.right_to_wrong),
                        str(test.wrong_to_right),
                        format_p_value(test.p_value),
                    )
                ),
            )
    _print(table)
    for line in change_lines(changes):
        print(line)


def change_lines(changes: Sequence[Change]) -> list[str]:
    """The first few changes for the worse, then for the better."""

    lines = []
    for kinds in (("right_to_wrong", "worse"), ("wrong_to_right", "better")):
        found = [change for change in changes if set(kinds) & set(change.changes.values())]
        for change in found[:CHANGES_SHOWN]:
            kind = next(kind for kind in change.changes.values() if kind in kinds)
            told = ", ".join(
                f"{name}: {shorten(text, 40)!r}" for name, text in change.predictions.items()
            )
            row = change.row
            wanted = row["answer"] if row["answer"] is not None else ", ".join(row["answers"][:3])
            lines.append(
                f"{kind.replace('_', ' ')}: {row['id']}: {shorten(row['question'], 60)!r} "
                f"({shorten(wanted, 40)!r}) {told}"
            )
        if len(found) > CHANGES_SHOWN:
            lines.append(f"… and {len(found) - CHANGES_SHOWN} more")
    return lines


def format_figure(name: str, value: float, *, signed: bool = False) -> str:
    """A figure in per cent where it is a share, else as it is."""

    sign = "+" if signed else ""
    return f"{100 * value:{sign}.2f} %" if is_fraction(name) else f"{value:{sign}.3f}"


def format_interval(name: str, interval: Mapping[str, float], *, signed: bool = False) -> str:
    low, high = (
        format_figure(name, interval[end], signed=signed).removesuffix(" %")
        for end in ("low", "high")
    )
    return f"{low} to {high}"


def format_p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _print(table: Table) -> None:
    """On stdout; in a pipe, where nobody says how wide it is, wide enough not to be wrapped. A
    question type or a path with brackets is shown as it is, not taken for a style."""

    width = None if sys.stdout.isatty() else PIPE_COLUMNS
    Console(width=width, markup=False, emoji=False).print(table)


def _figures(result: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    return result["metrics"] if kind is None else result["slices"].get(kind, {})
