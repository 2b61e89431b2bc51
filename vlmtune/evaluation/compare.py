"""Compares evaluations of the same samples: differences of figures, and changed answers.

rows of both, by id -> statistics of each metric -> figures of each, their difference with a paired
                       bootstrap interval, McNemar's test where scores are right or wrong

Paired: both are drawn the same pictures in each resample, so that what makes a sample hard for both
cancels out. The interval is the percentile one of metrics/base.py.

Letters for shapes: N samples, K numbers of a sample's statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.metrics.base import (
    Floats,
    Mean,
    Metric,
    Statistics,
    cluster_sums,
    interval_of,
    resample_weights,
)
from vlmtune.evaluation.metrics.registry import CHOICE_LIKELIHOOD, metrics_for
from vlmtune.evaluation.results import Result
from vlmtune.evaluation.retrieval.runner import wanted_figures

REFERENCE_KEYS = ("question", "answer", "answers", "options")
SIDES = {(1.0, 0.0): "right_to_wrong", (0.0, 1.0): "wrong_to_right"}


@dataclass(frozen=True)
class Difference:
    """A figure of both and `difference = value - first` with its 95 % interval."""

    first: float
    value: float
    difference: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class McNemar:
    """How many samples went from right to wrong and back, and how likely a split at least as
    uneven would be if both directions were equally likely."""

    right_to_wrong: int
    wrong_to_right: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """`target` against the first, by metric. `mcnemar` has those metrics that are the mean of
    scores that are all 0 or 1."""

    target: str
    against: str
    metrics: dict[str, Difference]
    mcnemar: dict[str, McNemar]


@dataclass(frozen=True)
class Change:
    """A sample that a target scores otherwise than the first; all by the target's name."""

    row: Mapping[str, Any]
    predictions: dict[str, str]
    scores: dict[str, float | None]
    changes: dict[str, str]

    def as_row(self) -> dict[str, object]:
        kept = ("id", "images", "question", "answer", "answers", "question_type")
        return {key: self.row.get(key) for key in kept} | {
            "predictions": self.predictions,
            "scores": self.scores,
            "changes": self.changes,
        }


def compare(
    results: Sequence[Result], *, metrics: Sequence[str] = (), seed: int = 0
) -> tuple[list[Comparison], list[Change]]:
    """Each of `results` but the first against the first, and the samples whose score changed.

    `metrics` are names, by default the task's. Scores are computed anew from the answers; those of
    retrieval and of choice by likelihood are taken from the rows. The median rank, which is no
    function of sums, is not compared. Raises VlmtuneError unless all are of one task and the same
    samples.
    """
    first = results[0]
    for other in results[1:]:
        check_same_samples(first, other)
    ids = list(first.rows)
    chosen = metrics_for(first.task, metrics)
    statistics = {
        result.name: {name: m.statistics(result.answered(ids)) for name, m in chosen.items()}
        for result in results
    }
    for name in _scored_elsewhere(first.task, metrics):
        chosen[name] = Mean(name, lambda sample: None)
        for result in results:
            statistics[result.name][name] = _scores_in_rows(result, ids, name)
    clusters: list[Hashable] = [
        tuple(first.rows[name]["images"]) or (name,) for name in ids
    ]  # as in the report's own intervals
    comparisons = [
        _compared(first.name, other.name, chosen, statistics, clusters, seed=seed)
        for other in results[1:]
    ]
    return comparisons, _changes(results, ids, statistics)


def check_same_samples(first: Result, other: Result) -> None:
    """Raise VlmtuneError unless both answer the same questions with the same references."""
    if first.task != other.task:
        raise VlmtuneError(
            "the tasks differ",
            got=f"{first.task} for {first.name}, {other.task} for {other.name}",
            expected="one task",
        )
    missing, added = first.rows.keys() - other.rows.keys(), other.rows.keys() - first.rows.keys()
    if missing or added:
        some = sorted(missing or added)[:3]
        raise VlmtuneError(
            "the evaluations are not of the same samples",
            got=f"{len(missing)} of {first.name} are not in {other.name}, {len(added)} the other "
            f"way round: {', '.join(some)}{' …' if len(missing or added) > 3 else ''}",
            expected="the same ids",
            do="evaluate both on the same --data",
        )
    for name, row in first.rows.items():
        changed = [key for key in REFERENCE_KEYS if row[key] != other.rows[name][key]]
        if changed:
            raise VlmtuneError(
                f"the evaluations differ in sample {name!r}",
                got=f"another {changed[0]} in {other.folder} than in {first.folder}",
                do="evaluate both on the same --data",
            )


def paired_differences(
    first: Floats,
    other: Floats,
    *,
    figures: Callable[[Floats], dict[str, Floats]],
    clusters: Sequence[Hashable],
    seed: int,
) -> dict[str, Difference]:
    """Each figure of the statistics `first` and `other`, both (N, K), sample by sample alike."""
    sums = [cluster_sums(statistics, clusters) for statistics in (first, other)]
    whole_first, whole_other = (figures(s.sum(axis=0)) for s in sums)
    drawn: dict[str, list[Floats]] = {name: [] for name in whole_first}
    for weights in resample_weights(len(sums[0]), seed=seed):
        drawn_first, drawn_other = (figures(weights @ s) for s in sums)
        for name in drawn:
            drawn[name].append(drawn_other[name] - drawn_first[name])
    differences = {}
    for name, values in drawn.items():
        before, after = float(whole_first[name]), float(whole_other[name])
        if math.isnan(before) or math.isnan(after):
            continue
        low, high = interval_of(np.concatenate(values), after - before)
        differences[name] = Difference(before, after, after - before, low, high, len(first))
    return differences


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> McNemar:
    """McNemar's test in its exact form (McNemar 1947, Psychometrika 12): of n changed samples the
    smaller side is Binomial(n, 1/2); two-sided."""
    n, fewer = right_to_wrong + wrong_to_right, min(right_to_wrong, wrong_to_right)
    tail = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        for k in range(fewer + 1)
    )
    return McNemar(right_to_wrong, wrong_to_right, min(1.0, 2 * tail))


def _scored_elsewhere(task: str, metrics: Sequence[str]) -> list[str]:
    """The metrics whose scores only the rows hold."""
    if task == "retrieval":
        return [name for name in wanted_figures(metrics) if not name.endswith("median_rank")]
    return [CHOICE_LIKELIHOOD] if CHOICE_LIKELIHOOD in metrics else []


def _scores_in_rows(result: Result, ids: Sequence[str], name: str) -> list[Statistics | None]:
    """Of `choice_likelihood`, or of `picture_to_text_r1`: score r1 of the rows of a direction."""
    scores: list[float | None] = []
    for row in (result.rows[sample] for sample in ids):
        direction = row.get("direction")
        if direction is None:
            scores.append(row["scores"].get(name))
        else:
            is_of_it = name.startswith(f"{direction}_")
            key = name.removeprefix(f"{direction}_")
            scores.append(row["scores"].get(key) if is_of_it else None)
    if all(score is None for score in scores):
        raise VlmtuneError(f"the report has no {name}", file=result.folder)
    return [None if score is None else Statistics(score, (score, 1.0)) for score in scores]


def _compared(
    first: str,
    other: str,
    metrics: Mapping[str, Metric],
    statistics: Mapping[str, Mapping[str, Sequence[Statistics | None]]],
    clusters: Sequence[Hashable],
    *,
    seed: int,
) -> Comparison:
    differences: dict[str, Difference] = {}
    tests: dict[str, McNemar] = {}
    for name, metric in metrics.items():
        pairs = [
            (a, b, cluster)
            for a, b, cluster in zip(statistics[first][name], statistics[other][name], clusters)
            if a is not None and b is not None
        ]
        if not pairs:
            continue
        found = paired_differences(
            np.array([a.sums for a, _, _ in pairs], dtype=np.float64),
            np.array([b.sums for _, b, _ in pairs], dtype=np.float64),
            figures=metric.figures,
            clusters=[cluster for _, _, cluster in pairs],
            seed=seed,
        )
        differences |= found
        scores = [(a.score, b.score) for a, b, _ in pairs]
        if all(score in (0.0, 1.0) for pair in scores for score in pair):
            test = mcnemar(scores.count((1.0, 0.0)), scores.count((0.0, 1.0)))
            means = tuple(sum(side) / len(pairs) for side in zip(*scores))
            # The first figure is the scores' mean (choice_accuracy), or none is (bleu).
            for figure, difference in list(found.items())[:1]:
                if np.allclose(means, (difference.first, difference.value), rtol=0, atol=1e-9):
                    tests[figure] = test
    return Comparison(other, first, differences, tests)


def _changes(
    results: Sequence[Result],
    ids: Sequence[str],
    statistics: Mapping[str, Mapping[str, Sequence[Statistics | None]]],
) -> list[Change]:
    """By a sample's first score that applies, as in predictions.jsonl."""
    found = []
    for index, name in enumerate(ids):
        scores: dict[str, float | None] = {}
        for result in results:
            applying = (of[index] for of in statistics[result.name].values())
            scores[result.name] = next((s.score for s in applying if s is not None), None)
        before = scores[results[0].name]
        changes = {
            other.name: _kind_of_change(before, after)
            for other in results[1:]
            if before is not None and (after := scores[other.name]) is not None and after != before
        }
        if changes:
            predictions = {result.name: result.rows[name]["prediction"] for result in results}
            found.append(Change(results[0].rows[name], predictions, scores, changes))
    return found


def _kind_of_change(before: float, after: float) -> str:
    return SIDES.get((before, after), "worse" if after < before else "better")
