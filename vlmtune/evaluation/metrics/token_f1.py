"""Token F1: the words that prediction and reference share.

Rajpurkar et al. 2016 (SQuAD, arXiv 1606.05250), section 6.1, as the data set's script: lower case,
without punctuation and articles, split at spaces; the harmonic mean of the shared words' share of
the prediction and of the reference, words counted as often as they occur; best over references.

As version 2.0 of the script, and unlike 1.1: where one of the two texts has no word left, the score
is 1 if both have none, else 0. No deviation.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from vlmtune.evaluation.metrics.base import Answered

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def token_f1(sample: Answered) -> float | None:
    """Between 0.0 and 1.0; None where the sample has no reference."""
    if not sample.references:
        return None
    given = _words(sample.prediction)
    return max(_f1(given, _words(reference)) for reference in sample.references)


def _f1(given: list[str], reference: list[str]) -> float:
    if not given or not reference:
        return float(given == reference)
    shared = (Counter(given) & Counter(reference)).total()
    return 2 * shared / (len(given) + len(reference))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
