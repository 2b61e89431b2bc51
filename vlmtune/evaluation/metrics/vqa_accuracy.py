"""VQA accuracy: an answer is right if three of the people asked gave it.

Antol et al. 2015 (arXiv 1505.00468), section 3, in the leave-one-out form of the evaluation
protocol: the mean, over the ten people, of min(others of the nine who gave this answer / 3, 1).

Deviation: the protocol has exactly ten answers; any number from `MIN_ANSWERS` is taken. With fewer,
not even a unanimous answer would score 1, and the sample is left out of the metric.
"""

from __future__ import annotations

from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.normalize import normalize_answer

MIN_ANSWERS = 4


def vqa_accuracy(sample: Answered) -> float | None:
    """Between 0.0 and 1.0; None where the sample has fewer than `MIN_ANSWERS` answers.

    `answer` is not used: the people's answers are the reference.
    """
    if len(sample.answers) < MIN_ANSWERS:
        return None
    normalized = normalize_answer(sample.prediction)
    matches = [normalize_answer(given) == normalized for given in sample.answers]
    total = sum(matches)
    return sum(min((total - is_match) / 3, 1.0) for is_match in matches) / len(matches)
