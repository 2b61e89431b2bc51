"""What a metric is: per sample a score and what it adds up to, and figures of the sums.

    samples -> statistics: per sample a score and K numbers, or None where it does not apply
            -> sum over samples, (K,) -> figures: accuracy, F1, BLEU-4, …

Figures are functions of sums (sums and counts, not means of means), so that a question type, a
bootstrap resample and the whole set are all computed alike.

Letters for shapes: K numbers of a sample's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def divided(numerator: Floats, denominator: Floats) -> Floats:
    """numerator / denominator, NaN where the denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient: Floats = np.where(denominator == 0, np.nan, numerator / denominator)
    return quotient
