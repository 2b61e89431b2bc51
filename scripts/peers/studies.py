"""What is looked at beside the tools: vlmtune without each of its tricks, and growth.

A line for each; the keys are vlmtune's recipe keys, given as on its command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peers.workloads import Workload

ABLATIONS: dict[str, tuple[str, ...]] = {
    "all on": (),
    "no packing": ("train.packing=false",),
    "no vision cache": ("train.vision_cache=off",),
    "neither": ("train.packing=false", "train.vision_cache=off"),
}
"""Name -> overrides. Checkpointing on and off is `--checkpointing both`."""


@dataclass(frozen=True)
class Grown:
    """A point of a growth curve: `factor` times the first point of its `axis`. Only on the axis
    `rows` does the number of rows grow."""

    axis: str
    factor: int
    workload: Workload


_BASE = Workload("growth", "growth", answers=(40, 80), sides=(180, 260))


def _longer(factor: int) -> Workload:
    """Answers and the area of pictures times `factor`."""
    sides = tuple(round(side * math.sqrt(factor)) for side in _BASE.sides)
    return Workload(
        f"growth-lengths-{factor}",
        f"lengths x {factor}",
        answers=(_BASE.answers[0] * factor, _BASE.answers[1] * factor),
        sides=(sides[0], sides[1]),
    )


def _pictures(count: int) -> Workload:
    return Workload(
        f"growth-pictures-{count}",
        f"{count} pictures a sample",
        answers=_BASE.answers,
        sides=_BASE.sides,
        pictures_per_row=count,
    )


def _rows(factor: int) -> Workload:
    return Workload(
        f"growth-rows-{factor}", f"rows x {factor}", answers=_BASE.answers, sides=_BASE.sides
    )


GROWTH: tuple[Grown, ...] = (
    *(Grown("lengths", factor, _longer(factor)) for factor in (1, 2, 4, 8)),
    *(Grown("rows", factor, _rows(factor)) for factor in (1, 10, 100)),
    *(Grown("pictures", count, _pictures(count)) for count in (1, 4, 16)),
)
