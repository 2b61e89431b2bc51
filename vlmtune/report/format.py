"""Formats numbers for people, and derives a figure's unit from its name.

The space before a per cent sign is a no-break space.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmtune.recipe.schema import is_lower_better

PER_CENT = "\u00a0%"
NOT_SHARES = ("cider", "rank", "loss", "count")
"""Words in the names of figures that are not shares, even where the value is below 1."""


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval over `count` samples; None where unknown."""

    name: str
    value: float
    low: float | None
    high: float | None
    count: int | None

    @property
    def is_share(self) -> bool:
        """Whether it is shown in per cent."""
        known = [x for x in (self.value, self.low, self.high) if x is not None]
        named = any(word in self.name for word in NOT_SHARES)
        return not named and all(0 <= x <= 1 for x in known)

    @property
    def lower_is_better(self) -> bool:
        return is_lower_better(self.name)

    @property
    def text(self) -> str:
        return self._show(self.value)

    @property
    def interval(self) -> str:
        """`25.0 to 42.5 %`, or nothing where there is no interval."""
        if self.low is None or self.high is None:
            return ""
        low, high = self._show(self.low), self._show(self.high)
        return f"{low.removesuffix(PER_CENT)} to {high}"

    def _show(self, value: float) -> str:
        return f"{100 * value:.1f}{PER_CENT}" if self.is_share else short_number(value)


def read_figures(metrics: Any) -> dict[str, Figure]:
    """The figures of a report's `metrics` object; entries without a value are left out."""
    found: dict[str, Figure] = {}
    for name, entry in metrics.items() if isinstance(metrics, Mapping) else ():
        value = number(entry.get("value")) if isinstance(entry, Mapping) else None
        if value is None:
            continue
        count = entry.get("count")
        found[str(name)] = Figure(
            name=str(name),
            value=value,
            low=number(entry.get("low")),
            high=number(entry.get("high")),
            count=count if isinstance(count, int) else None,
        )
    return found


def number(value: Any) -> float | None:
    """`value` as a finite float, or None: JSON lines may hold NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def short_number(value: float) -> str:
    """Four significant digits, thousands with commas: `0.7914`, `1,450`, `2.11e-06`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9:
        return f"{value:.3e}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}"


def format_bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} bytes"


def sentence(text: str) -> str:
    """`text` with a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


def format_name(name: str) -> str:
    """A figure's or a key's name as words: `exact_match` -> `exact match`, `r5` -> `R@5`."""
    return re.sub(r"\br(\d+)\b", r"R@\1", name.replace("_", " "))
