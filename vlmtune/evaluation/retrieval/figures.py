"""Recall, median rank and mean reciprocal rank of one direction, with intervals by picture.

Letters for shapes: Q queries, R resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from vlmtune.evaluation.metrics.base import Floats, divided
from vlmtune.evaluation.metrics.bootstrap import (
    CHUNK_NUMBERS,
    Interval,
    bootstrap_intervals,
    interval_of,
    resample_weights,
)
from vlmtune.evaluation.retrieval.ranking import CUTOFFS, Ranked

RECALLS = tuple(f"r{cutoff}" for cutoff in CUTOFFS)
FIGURES = (*RECALLS, "median_rank", "mrr")
"""In this order; `median_rank` alone is better where it is lower."""


def direction_figures(
    ranked: Sequence[Ranked], *, clusters: Sequence[Hashable], seed: int
) -> dict[str, Interval]:
    """The figures of a direction's queries (Q); `clusters[i]` is the picture of query i."""
    sums = np.array([(*query.recalls, query.reciprocal_rank, 1.0) for query in ranked])
    intervals = bootstrap_intervals(sums, figures=_means, clusters=clusters, seed=seed)
    ranks = np.array([query.rank for query in ranked])
    intervals["median_rank"] = median_interval(ranks, clusters=clusters, seed=seed)
    return {name: intervals[name] for name in FIGURES}


def median_interval(ranks: Floats, *, clusters: Sequence[Hashable], seed: int) -> Interval:
    """The median of `ranks` (Q,) with its interval over resampled pictures."""
    order = np.argsort(ranks)
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    of_query = np.array([numbers[cluster] for cluster in clusters])[order]  # (Q,)
    rows = max(1, CHUNK_NUMBERS // len(ranks))
    medians = [
        _medians(ranks[order], weights[start : start + rows, of_query])
        for weights in resample_weights(len(numbers), seed=seed)
        for start in range(0, len(weights), rows)
    ]
    value = float(np.median(ranks))
    return Interval(value, *interval_of(np.concatenate(medians), value), len(ranks))


def _medians(ranks: Floats, counts: Floats) -> Floats:
    """The medians (R,) of ascending `ranks` (Q,) that are drawn `counts` (R, Q) times."""
    below = np.cumsum(counts, axis=1)  # (R, Q)
    total = below[:, -1]
    lower, upper = (
        ranks[(below <= place[:, None]).sum(axis=1)]
        for place in (np.floor((total - 1) / 2), np.floor(total / 2))
    )
    middle: Floats = (lower + upper) / 2
    return middle


def _means(sums: Floats) -> dict[str, Floats]:
    names = (*RECALLS, "mrr")
    return {name: divided(sums[..., i], sums[..., -1]) for i, name in enumerate(names)}
