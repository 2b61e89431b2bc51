"""What a metric is: per sample a score, figures of their sums, and 95 % bootstrap intervals.

    samples -> statistics: per sample a score and K numbers, or None where it does not apply
            -> sum over samples, (K,) -> figures: accuracy, F1, BLEU-4, …

Figures are functions of sums (sums and counts, not means of means), so that a question type, a
bootstrap resample and the whole set are all computed alike.

Letters for shapes: K numbers of a sample's statistics.

Questions on one picture stand or fall together; resampling single questions would make the interval
too narrow. So a resample draws pictures with replacement and takes all their questions
(cluster bootstrap, Efron & Tibshirani 1993, chapter 13; the interval is the percentile one).

Letters for shapes: N samples, K numbers of a sample's statistics, R resamples, G pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answered:
    """One answered question. `answer` is the reference, `answers` several people's (VQA) or several
    accepted ones (captions), `options` the choices of a multiple-choice question."""

    prediction: str
    answer: str | None
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """Every accepted answer: `answers`, or the one `answer`."""
        return self.answers or (() if self.answer is None else (self.answer,))


@dataclass(frozen=True)
class Statistics:
    """`score` is the sample's own, as `predictions.jsonl` shows it; `sums` (K,) add up."""

    score: float
    sums: tuple[float, ...]


class Metric(Protocol):
    """A metric of generated answers."""

    def statistics(self, samples: Sequence[Answered]) -> list[Statistics | None]:
        """One entry a sample, None where the sample lacks what the metric needs. All entries have
        the same K. What needs the whole set (document frequencies, classes) looks at `samples`."""

    def figures(self, sums: Floats) -> dict[str, Floats]:
        """Named figures of sums (…, K), each of shape (…). A figure that is not defined (precision
        without a positive prediction) is NaN."""


@dataclass(frozen=True)
class Mean:
    """A metric that is the mean of a score per sample; `name` is its only figure."""

    name: str
    score: Callable[[Answered], float | None]

    def statistics(self, samples: Sequence[Answered]) -> list[Statistics | None]:
        scores = [self.score(sample) for sample in samples]
        return [None if score is None else Statistics(score, (score, 1.0)) for score in scores]

    def figures(self, sums: Floats) -> dict[str, Floats]:
        return {self.name: divided(sums[..., 0], sums[..., 1])}


@dataclass(frozen=True)
class Totals:
    """A metric of figures over the sums of a set: F1, BLEU, CIDEr-D, …"""

    statistics: Callable[[Sequence[Answered]], list[Statistics | None]]
    figures: Callable[[Floats], dict[str, Floats]]


def divided(numerator: Floats, denominator: Floats) -> Floats:
    """numerator / denominator, NaN where the denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient: Floats = np.where(denominator == 0, np.nan, numerator / denominator)
    return quotient


NUM_RESAMPLES = 2000
LEVEL = 0.95
CHUNK_NUMBERS = 4_000_000
"""Drawn numbers held at once: bounds the memory of (R, G) counts."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval over `count` samples."""

    value: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def bootstrap_intervals(
    sums: Floats,
    *,
    figures: Callable[[Floats], dict[str, Floats]],
    clusters: Sequence[Hashable],
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Interval]:
    """Each figure of `sums` (N, K) with its interval; `clusters[i]` names the picture of sample i.

    Deterministic in `seed`. With a single picture the interval is the figure itself. Resamples in
    which a figure is not defined do not count for it; a figure that is not defined on the whole
    set is left out. Raises ValueError without samples.
    """
    if len(sums) == 0:
        raise ValueError("no samples: a figure of nothing has no interval")
    of_cluster = cluster_sums(sums, clusters)  # (G, K)
    values = figures(of_cluster.sum(axis=0))
    drawn: dict[str, list[Floats]] = {name: [] for name in values}
    for weights in resample_weights(len(of_cluster), seed=seed, num_resamples=num_resamples):
        for name, figure in figures(weights @ of_cluster).items():
            drawn[name].append(figure)
    intervals = {}
    for name, value in values.items():
        if np.isnan(value):
            continue
        low, high = interval_of(np.concatenate(drawn[name]), float(value))
        intervals[name] = Interval(float(value), low, high, len(sums))
    return intervals


def interval_of(resampled: Floats, value: float) -> tuple[float, float]:
    """The 95 % percentile interval of resampled figures (R,); `value` where none is defined."""
    defined = resampled[~np.isnan(resampled)]
    if len(defined) == 0:
        return value, value
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def cluster_sums(sums: Floats, clusters: Sequence[Hashable]) -> Floats:
    """(N, K) statistics added up by cluster: (G, K), in order of first appearance."""
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    of_cluster = np.zeros((len(numbers), sums.shape[1]))
    np.add.at(of_cluster, [numbers[cluster] for cluster in clusters], sums)
    return of_cluster


def resample_weights(
    num_clusters: int, *, seed: int, num_resamples: int = NUM_RESAMPLES
) -> Iterator[Floats]:
    """How often each cluster is drawn in each resample, in chunks of (r, G)."""
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_NUMBERS // num_clusters)
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        drawn = generator.integers(0, num_clusters, size=(rows, num_clusters))
        drawn += num_clusters * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * num_clusters)
        yield weights.reshape(rows, num_clusters).astype(np.float64)
