"""Which metrics a task has. A new metric is one file and one line here."""

from __future__ import annotations

from typing import Protocol

from vlmtune.errors import VlmtuneError, nearest
from vlmtune.evaluation.metrics.exact_match import exact_match
from vlmtune.evaluation.metrics.vqa_accuracy import vqa_accuracy


class Metric(Protocol):
    """The score of one prediction; None where the sample lacks what the metric needs."""

    def __call__(
        self, prediction: str, *, answer: str | None, answers: tuple[str, ...]
    ) -> float | None: ...


# In the order of report; the first that applies to a sample is its `score` in predictions.jsonl.
METRICS: dict[str, dict[str, Metric]] = {
    "vqa": {"exact_match": exact_match, "vqa_accuracy": vqa_accuracy},
}


def metrics_for(task: str) -> dict[str, Metric]:
    """The metrics of `task` by name. Raises VlmtuneError for an unknown task."""
    if task not in METRICS:
        close = nearest(task, METRICS)
        raise VlmtuneError(
            "unknown task" + (f"; did you mean '{close}'?" if close else ""),
            got=repr(task),
            expected=" or ".join(sorted(METRICS)),
        )
    return METRICS[task]
