"""On what a model is still wrong: its slices, worst first, and its most frequent mix-ups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.report.curves import Tick, nice_range, tick_labels
from vlmtune.report.evaluations import Evaluation, Pair, is_right
from vlmtune.report.figures import PER_CENT, Figure

MAX_ROWS = 40
MAX_MIXUPS = 8
MAX_WORDS = 60
"""A longer answer is no name that is mixed up with another."""


@dataclass(frozen=True)
class Spot:
    """A figure on the scale: value and interval as per cent of the width."""

    at: float
    low: float
    high: float
    figure: Figure


@dataclass(frozen=True)
class ScaleRow:
    label: str
    count: int | None
    before: Spot | None
    after: Spot | None


@dataclass(frozen=True)
class Scale:
    """The main figure before and after, over all samples and by slice."""

    figure: str
    rows: tuple[ScaleRow, ...]
    ticks: tuple[Tick, ...]
    num_left_out: int


@dataclass(frozen=True)
class Mixup:
    answered: str
    right: str
    count: int


def worst_slices(evaluation: Evaluation, figure: str) -> list[tuple[str, Figure]]:
    """The slices by a figure, worst first."""
    found = [(kind, of[figure]) for kind, of in evaluation.slices.items() if figure in of]
    return sorted(found, key=lambda s: s[1].value, reverse=any(f.lower_is_better for _, f in found))


def mixups(evaluation: Evaluation) -> list[Mixup]:
    """The most frequent wrong answers with what was right, at least twice each. Not of ranked
    queries, whose answers are many."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in evaluation.rows:
        answered, right = row.get("prediction"), row.get("answer")
        if is_right(row) is not False or "direction" in row or not isinstance(answered, str):
            continue
        if isinstance(right, str) and max(len(answered), len(right)) <= MAX_WORDS:
            counts[(answered.strip(), right)] += 1
    return [
        Mixup(answered, right, count)
        for (answered, right), count in counts.most_common(MAX_MIXUPS)
        if count > 1
    ]


def draw_scale(pair: Pair) -> Scale | None:
    """The main figure on one scale, all samples first, then the slices, worst first."""
    shown, name = pair.shown, pair.main_figure
    if shown is None or name is None:
        return None
    before, after = pair.before, pair.after
    rows = [("all", _figure(before, name), _figure(after, name))]
    for kind, _ in worst_slices(shown, name):
        rows.append((kind, _figure(before, name, kind), _figure(after, name, kind)))
    figures = [f for _, *of in rows for f in of if f is not None]
    low, high, ticks = _range_of(figures)
    drawn = [
        ScaleRow(
            label=label,
            count=next((f.count for f in (a, b) if f is not None), None),
            before=_spot(b, low, high),
            after=_spot(a, low, high),
        )
        for label, b, a in rows[:MAX_ROWS]
    ]
    return Scale(name, tuple(drawn), tuple(ticks), max(0, len(rows) - MAX_ROWS))


def _figure(evaluation: Evaluation | None, name: str, kind: str | None = None) -> Figure | None:
    if evaluation is None:
        return None
    return (evaluation.figures if kind is None else evaluation.slices.get(kind, {})).get(name)


def _range_of(figures: Sequence[Figure]) -> tuple[float, float, list[Tick]]:
    if all(figure.is_share for figure in figures):
        return 0.0, 1.0, [Tick(25.0 * n, f"{25 * n}{PER_CENT}") for n in range(5)]
    known = [x for f in figures for x in (f.value, f.low, f.high) if x is not None]
    (low, high), values = nice_range(min(known), max(known))
    labels = tick_labels(values, "number")
    places = [100 * (value - low) / (high - low) for value in values]
    ticks = [Tick(place, label) for place, label in zip(places, labels, strict=True)]
    return low, high, ticks


def _spot(figure: Figure | None, low: float, high: float) -> Spot | None:
    if figure is None:
        return None

    def place(value: float | None) -> float:
        return 100 * ((figure.value if value is None else value) - low) / (high - low)

    return Spot(place(figure.value), place(figure.low), place(figure.high), figure)
