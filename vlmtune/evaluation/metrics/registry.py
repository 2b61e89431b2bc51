"""The metrics by name, and which a task reports. A new metric is one function and one line here.

A metric is a `Mean` of a score per sample, or figures of the `Totals` of a set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlmtune.errors import VlmtuneError, nearest
from vlmtune.evaluation.metrics import captions, choice, grounding, text
from vlmtune.evaluation.metrics.base import Mean, Metric, Totals
from vlmtune.evaluation.metrics.captions import rouge_l
from vlmtune.evaluation.metrics.text import (
    anls,
    exact_match,
    relaxed_accuracy,
    token_f1,
    vqa_accuracy,
)

METRICS: dict[str, Metric] = {
    "exact_match": Mean("exact_match", exact_match),
    "vqa_accuracy": Mean("vqa_accuracy", vqa_accuracy),
    "token_f1": Mean("token_f1", token_f1),
    "anls": Mean("anls", anls),
    "relaxed_accuracy": Mean("relaxed_accuracy", relaxed_accuracy),
    "yes_no": Totals(text.yes_no_statistics, text.yes_no_figures),
    "multiple_choice": Totals(choice.multiple_choice_statistics, choice.multiple_choice_figures),
    "classification": Totals(choice.classification_statistics, choice.classification_figures),
    "grounding": Totals(grounding.grounding_statistics, grounding.grounding_figures),
    "cider": Totals(captions.cider_statistics, captions.cider_figures),
    "bleu": Totals(captions.bleu_statistics, captions.bleu_figures),
    "rouge_l": Mean("rouge_l", rouge_l),
}

# The first metric that applies to a sample gives its `score` in predictions.jsonl.
TASKS: dict[str, tuple[str, ...]] = {
    "vqa": ("exact_match", "vqa_accuracy", "token_f1", "yes_no"),
    "caption": ("cider", "bleu", "rouge_l"),
    "choice": ("multiple_choice",),
    "classification": ("classification",),
    "grounding": ("grounding",),
    "retrieval": (),
}

CHOICE_LIKELIHOOD = "choice_likelihood"
"""Of the task `choice`; asks the model which option is likeliest (evaluation/likelihood.py)."""

NOT_FRACTIONS = ("cider", "rank", "loss")
"""How the names of figures end that are no share of 1, and are shown without a percent sign."""


def is_fraction(figure: str) -> bool:
    """Whether `figure` lies between 0 and 1."""
    return not figure.endswith(NOT_FRACTIONS)


def metrics_for(task: str, names: Sequence[str] = ()) -> dict[str, Metric]:
    """The metrics of generated answers called `names`, or without names those of `task`.

    Raises VlmtuneError for an unknown task or metric. Retrieval has none: there `names` are figures
    (retrieval/runner.py checks them).
    """
    if task not in TASKS:
        raise _unknown("task", task, TASKS)
    if task == "retrieval":
        return {}
    known = [*METRICS, *([CHOICE_LIKELIHOOD] if task == "choice" else [])]
    for name in names:
        if name not in known:
            raise _unknown("metric", name, known)
    return {name: METRICS[name] for name in names or TASKS[task] if name in METRICS}


def _unknown(what: str, name: str, known: Iterable[str]) -> VlmtuneError:
    close = nearest(name, known)
    return VlmtuneError(
        f"unknown {what}" + (f"; did you mean '{close}'?" if close else ""),
        got=repr(name),
        expected=" or ".join(sorted(known)),
    )
