"""Which numbers of metrics.jsonl share a chart; every number is in one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlmtune.report.curves import Chart, Point, Series, draw_chart
from vlmtune.report.figures import NOT_SHARES, number, sentence, spoken

NOT_DRAWN = ("step", "epoch", "ranks")
MAX_CHARTS = 40
MAX_LINES = 6
"""Of one chart; more are told apart with pain. The page has as many colors."""
TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "samples": "Samples and pictures per second",
    "tokens_per_second": "Tokens per second",
    "data_wait_fraction": "Time spent waiting for data",
    "peak_memory_bytes": "Peak memory",
    "held_out": "Figures on held-out data",
    "guard": "Figures on the guard's data",
}
"""Charts that are known, in the order of the page; others follow under their own names."""
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
    """The charts of all numbers in `lines`, and the names of those left out for their number."""
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
    return TITLES.get(group, sentence(spoken(group)))


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
    return named.get(name, spoken(name))
