"""The guard against forgetting: a second set on which the model must not get worse.

RUN/eval/guard-step-000000/  what the model could do before training
RUN/eval/guard-step-NNNNNN/  afterwards
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmtune.errors import VlmtuneError, nearest
from vlmtune.evaluation.metrics.registry import METRICS
from vlmtune.recipe.figures import is_lower_better
from vlmtune.recipe.schema import EvalSection

BEFORE = Path("eval") / "guard-step-000000"
"""In a run folder: the guard's report before training."""

ROUNDING = 1e-9
"""A fall from 0.90 to 0.88 is one of 0.02, whatever binary fractions make of it."""


@dataclass(frozen=True)
class GuardVerdict:
    """`drop` is how much worse the figure became; negative where it got better."""

    metric: str
    before: float
    after: float
    drop: float
    max_drop: float

    @property
    def has_fallen(self) -> bool:
        """Whether it became worse by more than is allowed."""
        return self.drop > self.max_drop + ROUNDING

    def as_dict(self) -> dict[str, object]:
        return {
            "metric": self.metric,
            "before": self.before,
            "after": self.after,
            "drop": self.drop,
            "max_drop": self.max_drop,
            "has_fallen": self.has_fallen,
        }

    def __str__(self) -> str:
        change = "forgotten: " if self.has_fallen else ""
        return (
            f"{change}guard {self.metric} {self.before:.4f} before training, {self.after:.4f} "
            f"after; at most {self.max_drop:g} worse is allowed"
        )


def guard_verdict(before: float, after: float, *, metric: str, max_drop: float) -> GuardVerdict:
    """Whether `metric` fell by more than `max_drop`; a figure that is better where it is lower (a
    loss, a rank) must not rise by more."""
    drop = after - before if is_lower_better(metric) else before - after
    return GuardVerdict(metric, before, after, drop, max_drop)


def guard_section(section: EvalSection) -> EvalSection:
    """How the guard's set is evaluated: its own task and metric, everything else as in `eval`."""
    guard = section.guard
    assert guard is not None
    # A figure (bleu_4) need not be a metric's name (bleu); then the task's own metrics have it.
    metrics = [guard.metric] if guard.metric in METRICS else []
    return section.model_copy(update={"task": guard.task, "metrics": metrics, "guard": None})


def guarded_metric(metrics: Mapping[str, object], name: str | None) -> str:
    """The figure that must not fall: `name`, or the first of `metrics`.

    Raises VlmtuneError where there is no such figure.
    """
    if name is None and metrics:
        return next(iter(metrics))
    if name is None or name not in metrics:
        close = None if name is None else nearest(name, metrics)
        raise VlmtuneError(
            "eval.guard.metric is not measured on the guard's data"
            + (f"; did you mean '{close}'?" if close else ""),
            got=repr(name),
            expected=" or ".join(metrics) or "a metric that applies to at least one sample",
        )
    return name


def read_figures(folder: Path) -> dict[str, float] | None:
    """The figures in a report's `metrics.json`; None where there is no report."""
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        return {name: float(interval["value"]) for name, interval in metrics.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VlmtuneError("not a report of an evaluation", file=path, got=str(error)) from error
