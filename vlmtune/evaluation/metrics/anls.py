"""ANLS: how much of the answer's text is right, and 0 where less than half of it is.

Average normalised Levenshtein similarity, Biten et al. 2019 (arXiv 1905.13648), section 5: the mean
over questions of the best, over the references, of

    1 - NL  if NL is below 0.5, else 0;   NL = edit distance / length of the longer text

on lower-case texts with single spaces, as the Robust Reading Competition's script does (DocVQA,
InfographicVQA; https://rrc.cvc.uab.es).

Deviations:
- From the paper, with the script: an NL of exactly 0.5 scores 0.5, not 0. That is common: one wrong
  digit of two. Figures of leaderboards are made by the script.
- From the script: lengths are those of the compared texts, not of the texts before spaces went.
- Two empty texts score 1.
"""

from __future__ import annotations

from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.sequences import edit_distance

THRESHOLD = 0.5


def anls(sample: Answered) -> float | None:
    """0.0, or 0.5 to 1.0; None where the sample has no reference."""
    if not sample.references:
        return None
    given = _plain(sample.prediction)
    return max(_similarity(given, _plain(reference)) for reference in sample.references)


def _similarity(given: str, reference: str) -> float:
    longer = max(len(given), len(reference))
    if longer == 0:
        return 1.0
    similarity = 1 - edit_distance(given, reference) / longer
    return similarity if similarity >= THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
