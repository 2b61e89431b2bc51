"""Curves as drawings that scale: lines in a box of 1000 x 1000, ticks as percentages.

    points -> at most MAX_POINTS, extremes kept -> nice range -> SVG path in the box

The box is stretched to the page's width; lines keep their own width (`non-scaling-stroke`). A zoom
is a part of the box, so the page's script never draws a line anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.report.figures import PER_CENT

MAX_POINTS = 1000
MAX_DOTTED = 40
"""A curve with at most so many points shows each of them."""
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
    """`unit` is `number` or `bytes` or `share`: how the script writes values."""

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
    """The chart of `series`, which have at least one point between them, over `x_range`."""
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
    """At most `limit` of `points`, in order: the first, the last, and of each stretch between them
    the lowest and the highest, so that no spike is lost."""
    if len(points) <= limit:
        return tuple(points)
    inner = points[1:-1]
    num_stretches = (limit - 2) // 2
    kept = [points[0]]
    for number in range(num_stretches):
        start = number * len(inner) // num_stretches
        end = (number + 1) * len(inner) // num_stretches
        stretch = range(start, end)
        lowest = min(stretch, key=lambda i: inner[i][1])
        highest = max(stretch, key=lambda i: inner[i][1])
        kept += [inner[i] for i in sorted({lowest, highest})]
    return (*kept, points[-1])


def nice_range(low: float, high: float) -> tuple[tuple[float, float], list[float]]:
    """A range around [low, high] that ends on round values, and its ticks. A range that nearly
    starts at 0 starts there."""
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
    """Evenly spaced `values`, each with as few digits as tell it from the next."""
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
