"""Exact match: the normalised prediction is the normalised reference.

Normalised as in `normalize.py`, the VQA protocol's rule. Not a benchmark's official figure: each
has its own normalisation (SQuAD's is in `token_f1.py`).
"""

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
    accepted = accepted_answers(sample)
    if not accepted:
        return None
    return float(normalize_answer(sample.prediction) in accepted)


def accepted_answers(sample: Answered) -> set[str]:
    """Normalised: `answer`, or else the most frequent of `answers`; empty without a reference."""
    if sample.answer is not None:
        return {normalize_answer(sample.answer)}
    counts = Counter(normalize_answer(answer) for answer in sample.answers)
    return {answer for answer, count in counts.items() if count == max(counts.values())}
