"""BLEU-1 to BLEU-4: the share of a caption's n-grams that are in one of its references.

Papineni et al. 2002 (ACL, P02-1040), over the whole set as the COCO caption toolkit computes it,
words as in `tokenize.py`. Summed over samples, for n = 1 to 4:

    proposed_n  n-grams of the prediction
    matched_n   of them those in a reference, each at most as often as in the one that has it most
    c           words of the prediction
    r           words of the reference closest to it in length, of two equally close the shorter

    BLEU-N = exp(min(0, 1 - r / c)) * (product over n = 1 … N of matched_n / proposed_n)^(1 / N)

Deviation: the toolkit adds 1e-15 to matched_n and 1e-9 to proposed_n, so that a set without any
matched 4-gram gets some 1e-4 instead of 0. Here it gets 0, and so does one without any proposed.

A sample's score is its own BLEU-4, mostly 0 for short captions; the figures are not its mean.

Letters for shapes: D samples with references, C captions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmtune.evaluation.metrics.base import Answered, Floats, Statistics
from vlmtune.evaluation.metrics.ngrams import (
    MAX_ORDER,
    Captions,
    Integers,
    NGrams,
    count_ngrams,
    read_captions,
    values_at,
)


def statistics(samples: Sequence[Answered]) -> list[Statistics | None]:
    """matched_1 … matched_4, proposed_1 … proposed_4, c, r."""
    captions = read_captions(samples)
    lengths = captions.lengths[captions.prediction_of]  # (D,)
    matched = [_matched(captions, ngrams) for ngrams in count_ngrams(captions)]
    proposed = [np.maximum(lengths - order, 0) for order in range(MAX_ORDER)]
    sums = np.array([*matched, *proposed, lengths, _closest_lengths(captions)]).T  # (D, 10)
    scores = figures(sums)[f"bleu_{MAX_ORDER}"]
    entries: list[Statistics | None] = [None] * len(samples)
    for position, score, numbers in zip(captions.positions, scores, sums):
        entries[position] = Statistics(float(score), tuple(map(float, numbers)))
    return entries


def figures(sums: Floats) -> dict[str, Floats]:
    matched, proposed = sums[..., :MAX_ORDER], sums[..., MAX_ORDER : 2 * MAX_ORDER]
    length, closest = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.where(length > 0, np.exp(np.minimum(0.0, 1 - closest / length)), 0.0)
    products = np.cumprod(matched / np.maximum(proposed, 1), axis=-1)
    return {
        f"bleu_{order}": brevity * products[..., order - 1] ** (1 / order)
        for order in range(1, MAX_ORDER + 1)
    }


def _matched(captions: Captions, ngrams: NGrams) -> Floats:
    """Per sample, how many n-grams of the prediction its references have: (D,)."""
    of_reference = captions.is_reference[ngrams.captions]
    keys = captions.sample_of[ngrams.captions] * ngrams.num_distinct + ngrams.ngrams
    known, groups = np.unique(keys[of_reference], return_inverse=True)
    most = np.zeros(len(known), dtype=np.int64)
    np.maximum.at(most, groups, ngrams.counts[of_reference])
    predicted = ngrams.counts[~of_reference]
    clipped = np.minimum(predicted, values_at(known, most.astype(float), keys[~of_reference]))
    samples = captions.sample_of[ngrams.captions[~of_reference]]
    return np.bincount(samples, clipped, minlength=len(captions.positions)).astype(float)


def _closest_lengths(captions: Captions) -> Integers:
    """Per sample, the length of the reference that is closest to the prediction in length: (D,)."""
    lengths = captions.lengths
    closest = []
    ends = [*captions.prediction_of[1:], len(lengths)]
    for start, end in zip(captions.prediction_of, ends):
        target = lengths[start]
        closest.append(min(lengths[start + 1 : end], key=lambda n: (abs(n - target), n)))
    return np.array(closest, dtype=np.int64)
