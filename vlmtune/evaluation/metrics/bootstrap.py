"""95 % percentile bootstrap intervals, with pictures resampled as wholes.

Questions on one picture stand or fall together; resampling single questions would make the interval
too narrow. So a resample draws pictures with replacement and takes all their questions
(cluster bootstrap, Efron & Tibshirani 1993, chapter 13; the interval is the percentile one).

Letters for shapes: R resamples, G pictures.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; `total` is the sum of the scores, `count` their number."""

    value: float
    low: float
    high: float
    total: float
    count: int

    def as_dict(self) -> dict[str, float | int]:
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "total": self.total,
            "count": self.count,
        }


def bootstrap_interval(
    scores: Sequence[float],
    *,
    clusters: Sequence[Hashable],
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """The mean of `scores` with its interval; `clusters[i]` names the picture of score i.

    Deterministic in `seed`. With a single picture the interval is the mean itself. Raises
    ValueError without scores.
    """
    if not scores:
        raise ValueError("no scores: a mean of nothing has no interval")
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    of_score = [numbers[cluster] for cluster in clusters]
    sums = np.bincount(of_score, weights=scores)  # (G,)
    counts = np.bincount(of_score)  # (G,)
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)  # (R,)
    for number in range(num_resamples):  # a row at a time: (R, G) would be gigabytes for 100k
        drawn = generator.integers(0, len(sums), size=len(sums))
        means[number] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    total = float(sums.sum())
    return Interval(
        value=total / len(scores), low=float(low), high=float(high), total=total, count=len(scores)
    )
