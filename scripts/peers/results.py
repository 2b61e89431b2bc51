"""From watched processes to figures: medians over rounds, ratios to the plain trainer, tables.

A run that failed has no figures and says why; it is a row of the table like any other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peers.case import BATCH_SIZE
from peers.process import Watched
from peers.tools import BASELINE


@dataclass(frozen=True)
class Key:
    """What was run; runs of the same key are rounds."""

    workload: str
    checkpointing: bool
    tool: str
    variant: str = ""

    @property
    def group(self) -> tuple[str, bool]:
        """What shares a table."""
        return self.workload, self.checkpointing


@dataclass(frozen=True)
class Figures:
    """Of one run. Seconds a step are medians over the steps after the warm-up: of all, of the
    first epoch's, and of later epochs'; rates count everything between these steps."""

    step_seconds: float
    first_epoch_seconds: float | None
    later_epochs_seconds: float | None
    samples_per_second: float
    supervised_per_second: float
    first_step_seconds: float
    wall_seconds: float
    peak_bytes: float
    tree_peak_bytes: float


def figures_of(
    watched: Watched, *, steps_per_epoch: int, supervised_per_sample: float, warm_up: int
) -> Figures:
    """`warm_up` steps are left out of everything but wall time and memory.

    Raises ValueError where so few steps were seen that none is left.
    """
    times = watched.step_seconds
    if len(times) < warm_up + 1 or len(times) < 2:
        raise ValueError(f"{len(times)} steps seen, more than {max(1, warm_up)} needed")
    lasted = [end - start for start, end in zip(times, times[1:])]  # of steps 2, 3, …
    steady = lasted[max(0, warm_up - 1) :]
    first = lasted[max(0, warm_up - 1) : steps_per_epoch - 1]
    later = lasted[max(steps_per_epoch - 1, warm_up - 1) :]
    rate = len(steady) * BATCH_SIZE / sum(steady)
    return Figures(
        step_seconds=statistics.median(steady),
        first_epoch_seconds=statistics.median(first) if first else None,
        later_epochs_seconds=statistics.median(later) if later else None,
        samples_per_second=rate,
        supervised_per_second=rate * supervised_per_sample,
        first_step_seconds=times[0],
        wall_seconds=watched.seconds,
        peak_bytes=float(watched.peak_bytes),
        tree_peak_bytes=float(watched.tree_peak_bytes),
    )


def medians(rounds: Sequence[Figures]) -> Figures:
    """Figure by figure over the rounds; one that no round has is None."""
    values: dict[str, Any] = {}
    for name in asdict(rounds[0]):
        found = [value for figures in rounds if (value := asdict(figures)[name]) is not None]
        values[name] = statistics.median(found) if found else None
    return Figures(**values)


@dataclass(frozen=True)
class Outcome:
    """Of a key: the figures of the rounds that ran, and what the others said."""

    key: Key
    rounds: tuple[Figures, ...]
    errors: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        median = asdict(medians(self.rounds)) if self.rounds else None
        rounds = [asdict(figures) for figures in self.rounds]
        return asdict(self.key) | {"median": median, "rounds": rounds, "errors": list(self.errors)}


COLUMNS: dict[str, tuple[str, float, str]] = {
    "step_seconds": ("s / step", 1, ".2f"),
    "first_epoch_seconds": ("in epoch 1", 1, ".2f"),
    "later_epochs_seconds": ("later", 1, ".2f"),
    "samples_per_second": ("samples/s", 1, ".2f"),
    "supervised_per_second": ("supervised tokens/s", 1, ".0f"),
    "first_step_seconds": ("to 1st step, s", 1, ".1f"),
    "wall_seconds": ("whole, s", 1, ".0f"),
    "peak_bytes": ("peak MB", 1e-6, ".0f"),
    "tree_peak_bytes": ("with children, MB", 1e-6, ".0f"),
}
"""Figure -> its heading, what it is multiplied by, and its digits."""
HEAD = "| tool | " + " | ".join(heading for heading, _, _ in COLUMNS.values()) + " |"


def table(outcomes: Sequence[Outcome], titles: Mapping[str, str]) -> str:
    """A Markdown table for each workload and checkpointing, ratios to the plain trainer in
    brackets (for seconds and memory below 1 is better, for rates above)."""
    parts = []
    for workload, checkpointing in unique(o.key.group for o in outcomes):
        rows = [o for o in outcomes if o.key.group == (workload, checkpointing)]
        base = next((medians(o.rounds) for o in rows if o.key.tool == BASELINE and o.rounds), None)
        state = "on" if checkpointing else "off"
        parts += [f"\n**{titles[workload]}, checkpointing {state}**\n", HEAD, rule(HEAD)]
        parts += [table_row(outcome, base) for outcome in rows]
    return "\n".join(parts)


def table_row(outcome: Outcome, base: Figures | None) -> str:
    name = " ".join(part for part in (outcome.key.tool, outcome.key.variant) if part)
    if not outcome.rounds:
        return f"| {name} | failed: {outcome.errors[0].replace('|', '/')}" + " |" * len(COLUMNS)
    own, other = asdict(medians(outcome.rounds)), asdict(base) if base else {}
    cells = [
        cell(own[figure], other.get(figure), scale, digits)
        for figure, (_, scale, digits) in COLUMNS.items()
    ]
    if outcome.errors:
        name += f" ({len(outcome.errors)} of {len(outcome.errors) + len(outcome.rounds)} failed)"
    return "| " + " | ".join([name, *cells]) + " |"


def cell(value: float | None, base: float | None, scale: float, digits: str) -> str:
    """A figure with its ratio to `base` in brackets; nothing where there is no figure."""
    if value is None:
        return ""
    return f"{value * scale:{digits}}" + (f" ({value / base:.2f})" if base else "")


def rule(head: str) -> str:
    return "|---" * head.replace("| ", "|").strip("|").count("|") + "|---|"


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
