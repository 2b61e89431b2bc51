"""The best evaluation of a run so far, and when to stop waiting for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vlmtune.errors import VlmtuneError
from vlmtune.recipe.figures import is_lower_better


@dataclass(frozen=True)
class Best:
    """`value` of `metric` at optimizer step `step`; `num_since`: evaluations after it."""

    metric: str
    step: int
    value: float
    num_since: int = 0


def best_by(best: Best | None, metric: str | None) -> Best | None:
    """`best` where it is one by `metric`. Of another metric (the recipe was changed between a stop
    and its resume) it says nothing."""
    return best if best is not None and best.metric == metric else None


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether `value` beats `than`; NaN never does, and everything else beats NaN."""
    if math.isnan(value) or math.isnan(than):
        return not math.isnan(value)
    return value < than if is_lower_better(metric) else value > than


def updated(best: Best | None, *, metric: str, step: int, values: Mapping[str, float]) -> Best:
    """The best after an evaluation at `step`. Raises VlmtuneError where it has no such metric."""
    if metric not in values:
        raise VlmtuneError(
            "eval.best_metric is no figure of the evaluation on data.eval",
            got=metric,
            expected=" or ".join(values),
        )
    value = values[metric]
    best = best_by(best, metric)
    if best is None or is_better(metric, value, best.value):
        return Best(metric, step, value)
    return replace(best, num_since=best.num_since + 1)


def is_over(best: Best | None, patience: int | None) -> bool:
    """Whether `patience` evaluations in a row brought nothing better."""
    return best is not None and patience is not None and best.num_since >= patience
