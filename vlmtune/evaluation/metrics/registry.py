"""The metrics by name, and which a task reports. A new metric is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmtune.errors import VlmtuneError, nearest
from vlmtune.evaluation.metrics.base import Mean, Metric
from vlmtune.evaluation.metrics.exact_match import exact_match
from vlmtune.evaluation.metrics.vqa_accuracy import vqa_accuracy

METRICS: dict[str, Metric] = {
    "exact_match": Mean("exact_match", exact_match),
    "vqa_accuracy": Mean("vqa_accuracy", vqa_accuracy),
}

# The first metric that applies to a sample gives its `score` in predictions.jsonl.
TASKS: dict[str, tuple[str, ...]] = {
    "vqa": ("exact_match", "vqa_accuracy"),
    "caption": ("exact_match",),
    "choice": ("exact_match",),
    "classification": ("exact_match",),
    "grounding": ("exact_match",),
    "retrieval": (),
}


def metrics_for(task: str, names: Sequence[str] = ()) -> dict[str, Metric]:
    """The metrics called `names`, or without names those of `task`.

    Raises VlmtuneError for an unknown task or metric.
    """
    if task not in TASKS:
        raise _unknown("task", task, TASKS)
    for name in names:
        if name not in METRICS:
            raise _unknown("metric", name, METRICS)
    return {name: METRICS[name] for name in names or TASKS[task]}


def _unknown(what: str, name: str, known: Mapping[str, object]) -> VlmtuneError:
    close = nearest(name, known)
    return VlmtuneError(
        f"unknown {what}" + (f"; did you mean '{close}'?" if close else ""),
        got=repr(name),
        expected=" or ".join(sorted(known)),
    )
