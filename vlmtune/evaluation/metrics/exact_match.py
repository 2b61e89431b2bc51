"""Exact match: the normalised prediction is the normalised reference."""

from __future__ import annotations

from collections import Counter

from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.normalize import normalize_answer


def exact_match(sample: Answered) -> float | None:
    """1.0 or 0.0; None where the sample has no reference.

    `answer` is the conversation's last assistant turn. Without one, the most frequent of `answers`
    counts, and each of several equally frequent ones: the consensus of ten people, or any entry of
    a list of accepted answers.
    """
    if sample.answer is not None:
        accepted = {normalize_answer(sample.answer)}
    else:
        accepted = _most_frequent(sample.answers)
    if not accepted:
        return None
    return float(normalize_answer(sample.prediction) in accepted)


def _most_frequent(answers: tuple[str, ...]) -> set[str]:
    counts = Counter(normalize_answer(answer) for answer in answers)
    return {answer for answer, count in counts.items() if count == max(counts.values())}
