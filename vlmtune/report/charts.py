"""Draws curves and rank maps as SVG, and decides which metrics share a chart.

    points -> at most MAX_POINTS, extremes kept -> nice range -> SVG path in the box

The box is stretched to the page's width; lines keep their own width (`non-scaling-stroke`). To
zoom, the page's script shows a part of the box; it never redraws a line.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vlmtune.report.format import NOT_SHARES, PER_CENT, format_name, number, sentence

MAX_POINTS = 1000
MAX_DOTTED = 40
"""A curve with at most this many points shows each point."""
BOX = 1000

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Line:
    """A drawn series; `dots` is the path of its single points, empty for a dense curve."""

    name: str
    path: str
    dots: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Tick:
    """`percent` from the left or the top."""

    percent: float
    label: str


@dataclass(frozen=True)
class Chart:
    """`unit` is `number`, `bytes` or `share`: it decides how the script writes values."""

    id: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def draw_chart(
    chart_id: str,
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "number",
    x_range: tuple[float, float],
) -> Chart:
    """The chart of `series` over `x_range`; at least one series has a point."""
    thinned = [Series(s.name, downsample(s.points)) for s in series if s.points]
    values = [y for s in thinned for _, y in s.points]
    y_range, y_values = nice_range(min(values), max(values))
    return Chart(
        id=chart_id,
        title=title,
        unit=unit,
        lines=tuple(_line(s, x_range, y_range) for s in thinned),
        x_range=x_range,
        y_range=y_range,
        x_ticks=tuple(
            Tick(100 * _share(x, x_range), f"{x:g}") for x in ticks_between(*x_range, whole=True)
        ),
        y_ticks=tuple(
            Tick(100 - 100 * _share(y, y_range), label)
            for y, label in zip(y_values, tick_labels(y_values, unit), strict=True)
        ),
    )


def downsample(points: Sequence[Point], limit: int = MAX_POINTS) -> tuple[Point, ...]:
    """At most `limit` of `points`, in order: the first, the last, and the lowest and the highest of
    each interval between them, so that no spike is lost."""
    if len(points) <= limit:
        return tuple(points)
    inner = points[1:-1]
    num_stretches = (limit - 2) // 2
    kept = [points[0]]
    for index in range(num_stretches):
        start = index * len(inner) // num_stretches
        end = (index + 1) * len(inner) // num_stretches
        stretch = range(start, end)
        lowest = min(stretch, key=lambda i: inner[i][1])
        highest = max(stretch, key=lambda i: inner[i][1])
        kept += [inner[i] for i in sorted({lowest, highest})]
    return (*kept, points[-1])


def nice_range(low: float, high: float) -> tuple[tuple[float, float], list[float]]:
    """A range around [low, high] that ends on round values, and its ticks. A range that starts near
    0 starts at 0."""
    if low > 0 and low < 0.4 * high:
        low = 0.0
    if math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-12):
        margin = abs(low) * 0.1
        low, high = (low - margin, high + margin) if margin else (0.0, 1.0)
    step = _nice_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    values = [number * step for number in range(first, last + 1)]
    return (values[0], values[-1]), values


def ticks_between(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round values inside [low, high], about five; `whole`: whole numbers only."""
    step = _nice_step((high - low) / 5) if high > low else 1.0
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(values: Sequence[float], unit: str) -> list[str]:
    """Labels of evenly spaced `values`, each with as few digits as distinguish it from the next."""
    size, ending = {"bytes": (1e9, " GB"), "share": (0.01, PER_CENT)}.get(unit, (1.0, ""))
    shown = [value / size for value in values]
    close = abs(shown[1] - shown[0]) / 100 if len(shown) > 1 else 0.0
    return [_rounded(value, close) + ending for value in shown]


def _rounded(value: float, close: float) -> str:
    """`value` to within `close`, with the fewest digits."""
    if abs(value) <= close:
        return "0"
    digits = next(n for n in range(1, 18) if abs(float(f"{value:.{n}g}") - value) <= close)
    value = float(f"{value:.{digits}g}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(0, digits - 1 - int(exponent))}f}"
    return f"{mantissa}e{int(exponent)}"


def _nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def _line(series: Series, x_range: tuple[float, float], y_range: tuple[float, float]) -> Line:
    placed = [(BOX * _share(x, x_range), BOX - BOX * _share(y, y_range)) for x, y in series.points]
    path = "M" + "L".join(f"{x:.6g} {y:.6g}" for x, y in placed)
    dots = ""
    if len(placed) <= MAX_DOTTED:  # a line without length and with round ends is a dot
        dots = "".join(f"M{x:.6g} {y:.6g}h0" for x, y in placed)
    return Line(series.name, path, dots, series.points)


def _share(value: float, of: tuple[float, float]) -> float:
    low, high = of
    return 0.5 if high == low else (value - low) / (high - low)


NOT_DRAWN = ("step", "epoch", "ranks")
MAX_CHARTS = 40
MAX_LINES = 6
"""Lines in one chart; more are hard to distinguish. The page has as many colors."""
TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "samples": "Samples and pictures per second",
    "tokens_per_second": "Tokens per second",
    "data_wait_fraction": "Time spent waiting for data",
    "peak_memory_bytes": "Peak memory",
    "held_out": "Metrics on held-out data",
    "guard": "Metrics on the guard's data",
}
"""Titles of known charts, in the order of the page; other charts follow under their own names."""
FIRST = ("loss", "held_out", "guard")
GROUPS = {
    "loss": "loss",
    "eval_loss": "loss",
    "samples_per_second": "samples",
    "images_per_second": "samples",
}
TRAINING = "training"
UNITS = {"peak_memory_bytes": "bytes", "data_wait_fraction": "share"}


def metric_charts(lines: Sequence[Mapping[str, Any]]) -> tuple[list[Chart], list[str]]:
    """The charts of all numbers in `lines`, and the names of those beyond MAX_CHARTS."""
    series: dict[str, list[Point]] = defaultdict(list)
    for line in lines:
        for name, value in flat_numbers(line):
            series[name].append((float(line["step"]), value))
    groups: dict[str, list[Series]] = defaultdict(list)
    for name, points in series.items():
        group = _group_of(name, points)
        groups[group].append(Series(_short_name(name, group), tuple(points)))
    groups["loss"].sort(key=lambda s: s.name != TRAINING)  # it is in no line of step 0
    steps = [line["step"] for line in lines]
    x_range = (float(min(steps, default=0)), float(max(steps, default=1)))
    order = [*FIRST, *(name for name in TITLES if name not in FIRST)]
    names = sorted(
        (n for n in groups if groups[n]), key=lambda n: order.index(n) if n in order else len(order)
    )
    drawn = [
        (name, number, part)
        for name in names
        for number, part in enumerate(_parted(groups[name]), start=1)
    ]
    charts = [
        draw_chart(
            f"chart-{index}",
            _title(name) + (f", {number}" if len(groups[name]) > MAX_LINES else ""),
            part,
            unit=_unit_of(name, groups[name]),
            x_range=x_range,
        )
        for index, (name, number, part) in enumerate(drawn[:MAX_CHARTS])
    ]
    return charts, list(dict.fromkeys(name for name, _, _ in drawn[MAX_CHARTS:]))


def flat_numbers(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a line under `a/b` names."""
    for name, value in line.items():
        if not prefix and name in NOT_DRAWN:
            continue
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}{name}/")
        elif (found := number(value)) is not None:
            yield f"{prefix}{name}", found


def _title(group: str) -> str:
    return TITLES.get(group, sentence(format_name(group)))


def _parted(series: Sequence[Series]) -> list[Sequence[Series]]:
    """`series` in parts of about equal size, none above MAX_LINES."""
    num_parts = math.ceil(len(series) / MAX_LINES)
    size = math.ceil(len(series) / num_parts)
    return [series[start : start + size] for start in range(0, len(series), size)]


def _group_of(name: str, points: Sequence[Point]) -> str:
    if name in GROUPS:
        return GROUPS[name]
    whole, _, part = name.partition("/")
    if part:
        return whole
    for prefix, group in (("eval_", "held_out"), ("guard_", "guard")):
        if name.startswith(prefix) and _is_share(name, points):
            return group
    return name


def _is_share(name: str, points: Sequence[Point]) -> bool:
    return not any(w in name for w in NOT_SHARES) and all(0 <= y <= 1 for _, y in points)


def _unit_of(group: str, series: Sequence[Series]) -> str:
    return UNITS.get(group, "share" if group in ("held_out", "guard") else "number")


def _short_name(name: str, group: str) -> str:
    for prefix in (f"{group}/", "eval_" if group == "held_out" else "", "guard_"):
        if prefix and name.startswith(prefix):
            name = name.removeprefix(prefix)
    named = {"loss": TRAINING, "eval_loss": "held-out"} if group == "loss" else {}
    return named.get(name, format_name(name))


MAX_COLUMNS = 120
MAX_ROWS = 600


@dataclass(frozen=True)
class Stretch:
    """Logged steps `first` to `last` at one rank; `left` and `width` in per cent of the row."""

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
