"""Ranks over time as a heat map: a row a module, a stretch of equal rank one rectangle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vlmtune.report.curves import Tick, ticks_between

MAX_COLUMNS = 120
MAX_ROWS = 600


@dataclass(frozen=True)
class Stretch:
    """Logged steps `first` to `last` at one rank; place and width in per cent of the row."""

    left: float
    width: float
    rank: int
    opacity: float
    first: int
    last: int


@dataclass(frozen=True)
class RankRow:
    path: str
    label: str
    stretches: tuple[Stretch, ...]
    first_rank: int
    last_rank: int


@dataclass(frozen=True)
class RankMap:
    rows: tuple[RankRow, ...]
    highest: int
    first_total: int
    last_total: int
    num_modules: int
    ticks: tuple[Tick, ...]


def draw_rank_map(lines: Sequence[Mapping[str, Any]]) -> RankMap | None:
    """The map of all lines with `ranks`; None where there is none."""
    logged = [(line["step"], _ranks(line)) for line in lines if _ranks(line)]
    if not logged:
        return None
    columns = _thinned(logged)
    steps = [step for step, _ in columns]
    paths = sorted({path for _, ranks in columns for path in ranks}, key=_natural)
    highest = max(rank for _, ranks in columns for rank in ranks.values())
    prefix = _common_prefix(paths)
    rows = [_row(path, path.removeprefix(prefix), columns, highest) for path in paths[:MAX_ROWS]]
    ticks = [
        Tick(100 * (_column_at(steps, x) + 0.5) / len(steps), f"{x:g}")
        for x in ticks_between(steps[0], steps[-1], whole=True)
    ]
    return RankMap(
        rows=tuple(rows),
        highest=highest,
        first_total=sum(columns[0][1].values()),
        last_total=sum(columns[-1][1].values()),
        num_modules=len(paths),
        ticks=tuple(ticks),
    )


def _ranks(line: Mapping[str, Any]) -> dict[str, int]:
    ranks = line.get("ranks")
    if not isinstance(ranks, Mapping):
        return {}
    return {str(path): rank for path, rank in ranks.items() if isinstance(rank, int)}


def _thinned(logged: Sequence[tuple[int, dict[str, int]]]) -> list[tuple[int, dict[str, int]]]:
    if len(logged) <= MAX_COLUMNS:
        return list(logged)
    last = len(logged) - 1
    return [logged[number * last // (MAX_COLUMNS - 1)] for number in range(MAX_COLUMNS)]


def _row(
    path: str, label: str, columns: Sequence[tuple[int, dict[str, int]]], highest: int
) -> RankRow:
    present = [(i, step, ranks[path]) for i, (step, ranks) in enumerate(columns) if path in ranks]
    stretches = []
    for rank, group in groupby(present, key=lambda column: column[2]):
        cells = list(group)
        stretches.append(
            Stretch(
                left=100 * cells[0][0] / len(columns),
                width=100 * (cells[-1][0] - cells[0][0] + 1) / len(columns),
                rank=rank,
                opacity=round(rank / highest, 3) if highest else 0.0,
                first=cells[0][1],
                last=cells[-1][1],
            )
        )
    return RankRow(path, label, tuple(stretches), present[0][2], present[-1][2])


def _column_at(steps: Sequence[int], x: float) -> int:
    """The last column that is not after step `x`."""
    return max((i for i, step in enumerate(steps) if step <= x), default=0)


def _natural(path: str) -> list[tuple[int, int, str]]:
    """A sort key by which layer 2 comes before layer 10."""
    return [
        (0, int(piece), "") if piece.isdigit() else (1, 0, piece)
        for piece in re.split(r"(\d+)", path)
        if piece
    ]


def _common_prefix(paths: Sequence[str]) -> str:
    """The dotted beginning that all paths share, with its dot."""
    first = paths[0].split(".")
    for depth in range(len(first) - 1, 0, -1):
        prefix = ".".join(first[:depth]) + "."
        if all(path.startswith(prefix) for path in paths):
            return prefix
    return ""
