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


HEAD = (
    "| tool | s / step | epoch 1 | later | samples/s | supervised tokens/s | to 1st step, s "
    "| whole, s | peak MB | of it all, MB |"
)


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
        return f"| {name} | failed: {outcome.errors[0].replace('|', '/')}" + " |" * 9
    own = medians(outcome.rounds)
    cells = [
        ratio(own.step_seconds, base and base.step_seconds, "{:.2f}"),
        ratio(own.first_epoch_seconds, base and base.first_epoch_seconds, "{:.2f}"),
        ratio(own.later_epochs_seconds, base and base.later_epochs_seconds, "{:.2f}"),
        ratio(own.samples_per_second, base and base.samples_per_second, "{:.2f}"),
        ratio(own.supervised_per_second, base and base.supervised_per_second, "{:.0f}"),
        ratio(own.first_step_seconds, base and base.first_step_seconds, "{:.1f}"),
        ratio(own.wall_seconds, base and base.wall_seconds, "{:.0f}"),
        ratio(own.peak_bytes / 1e6, base and base.peak_bytes / 1e6, "{:.0f}"),
        ratio(own.tree_peak_bytes / 1e6, base and base.tree_peak_bytes / 1e6, "{:.0f}"),
    ]
    if outcome.errors:
        name += f" ({len(outcome.errors)} of {len(outcome.errors) + len(outcome.rounds)} failed)"
    return "| " + " | ".join([name, *cells]) + " |"


def ratio(value: float | None, base: float | None, form: str) -> str:
    if value is None:
        return ""
    return form.format(value) + (f" ({value / base:.2f})" if base else "")


def rule(head: str) -> str:
    return "|---" * head.replace("| ", "|").strip("|").count("|") + "|---|"


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
