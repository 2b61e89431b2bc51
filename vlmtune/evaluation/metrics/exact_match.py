"""Exact match: the normalised prediction is the normalised reference."""

from __future__ import annotations

from collections import Counter

from vlmtune.evaluation.metrics.normalize import normalize_answer


def exact_match(prediction: str, *, answer: str | None, answers: tuple[str, ...]) -> float | None:
    """1.0 or 0.0; None where the sample has no reference.

    `answer` is the conversation's last assistant turn. Without one, the most frequent of `answers`
    counts, and each of several equally frequent ones: the consensus of ten people, or any entry of
    a list of accepted answers.
    """
    accepted = {normalize_answer(answer)} if answer is not None else _most_frequent(answers)
    if not accepted:
        return None
    return float(normalize_answer(prediction) in accepted)


def _most_frequent(answers: tuple[str, ...]) -> set[str]:
    counts = Counter(normalize_answer(answer) for answer in answers)
    return {answer for answer, count in counts.items() if count == max(counts.values())}
