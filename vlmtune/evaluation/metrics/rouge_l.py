"""ROUGE-L: the words of the longest common subsequence of a caption and a reference.

Lin 2004 (ACL, W04-1013), section 3, as the COCO caption toolkit computes it, words as in
`tokenize.py`. With P the best, over the references, of common words / words of the caption, and R
the best of common words / words of the reference (not necessarily of the same reference):

    ROUGE-L = (1 + 1.2^2) P R / (R + 1.2^2 P)

No deviation but the tokenizer's. Other ROUGE-L, as for summaries, have beta = 1, one reference and
stemming.
"""

from __future__ import annotations

from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.sequences import common_length
from vlmtune.evaluation.metrics.tokenize import tokenize_caption

BETA_SQUARED = 1.2**2


def rouge_l(sample: Answered) -> float | None:
    """Between 0.0 and 1.0; None where the sample has no reference."""
    if not sample.references:
        return None
    given = tokenize_caption(sample.prediction)
    precision = recall = 0.0
    for reference in map(tokenize_caption, sample.references):
        common = common_length(given, reference)
        if common:
            precision = max(precision, common / len(given))
            recall = max(recall, common / len(reference))
    if precision == 0:
        return 0.0
    return (1 + BETA_SQUARED) * precision * recall / (recall + BETA_SQUARED * precision)
