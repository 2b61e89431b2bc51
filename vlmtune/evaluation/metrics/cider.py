"""CIDEr-D: how alike a caption's n-grams are to its references', rare n-grams weighing more.

Vedantam et al. 2015 (arXiv 1411.5726), section 5 and the variant D of its appendix, with the
COCO caption toolkit's settings, words as in `tokenize.py`. For n = 1 to 4, with g(c, w) = (times w
is in caption c) * log(number of samples / number of samples whose references have w):

    sim_n(c, r) = sum over w of min(g(c, w), g(r, w)) * g(r, w) / (|g(c)| |g(r)|)
                  * exp(-(len(c) - len(r))^2 / (2 * 6^2))
    CIDEr-D(c)  = 10 * mean over n and references r of sim_n(c, r)

The figure is the mean over samples, from 0 to 10. Papers often give it times 100 ("120" is 1.2).

What to know: the document frequencies are those of the references at hand. A figure of a subset is
not comparable with one of the whole, a single sample scores 0, and a slice or a bootstrap resample
is scored with the whole set's frequencies. A sample is one document, as a picture is in COCO: give
a picture's captions as `answers` of one sample, not as several samples. No deviation but the
tokenizer's.

Letters for shapes: D samples with references, C captions, M pairs of a caption and an n-gram in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmtune.evaluation.metrics.base import Answered, Floats, Statistics, divided
from vlmtune.evaluation.metrics.ngrams import (
    MAX_ORDER,
    Captions,
    NGrams,
    count_ngrams,
    read_captions,
    values_at,
)

SIGMA = 6.0
SCALE = 10.0


def statistics(samples: Sequence[Answered]) -> list[Statistics | None]:
    """The sample's CIDEr-D, and 1."""
    captions = read_captions(samples)
    entries: list[Statistics | None] = [None] * len(samples)
    for position, score in zip(captions.positions, cider_scores(captions)):
        entries[position] = Statistics(float(score), (float(score), 1.0))
    return entries


def figures(sums: Floats) -> dict[str, Floats]:
    return {"cider": divided(sums[..., 0], sums[..., 1])}


def cider_scores(captions: Captions) -> Floats:
    """CIDEr-D of each sample: (D,)."""
    num_samples = len(captions.positions)
    lengths = captions.lengths
    prediction = captions.prediction_of[captions.sample_of]  # (C,), of the caption's sample
    closeness = np.exp(-((lengths - lengths[prediction]) ** 2) / (2 * SIGMA**2))  # (C,)
    similarity = sum(
        (_similarities(captions, ngrams) for ngrams in count_ngrams(captions)),
        start=np.zeros(len(lengths)),
    )
    is_reference = captions.is_reference
    of_reference = (similarity * closeness)[is_reference] / MAX_ORDER
    sample_of = captions.sample_of[is_reference]
    totals = np.bincount(sample_of, of_reference, minlength=num_samples)
    scores: Floats = SCALE * totals / np.bincount(sample_of, minlength=num_samples)
    return scores


def _similarities(captions: Captions, ngrams: NGrams) -> Floats:
    """Clipped cosine of each caption with its sample's prediction, for one order: (C,)."""
    num_captions = len(captions.words)
    prediction = captions.prediction_of[captions.sample_of]  # (C,)
    weights = ngrams.counts * _rarity(captions, ngrams)  # (M,)
    norms = np.sqrt(np.bincount(ngrams.captions, weights**2, minlength=num_captions))  # (C,)
    keys = ngrams.captions * ngrams.num_distinct + ngrams.ngrams
    wanted = prediction[ngrams.captions] * ngrams.num_distinct + ngrams.ngrams
    predicted = values_at(keys, weights, wanted)  # (M,), of the same n-gram in the prediction
    products = np.minimum(predicted, weights) * weights
    dots = np.bincount(ngrams.captions, products, minlength=num_captions).astype(np.float64)
    return np.nan_to_num(divided(dots, norms * norms[prediction]))


def _rarity(captions: Captions, ngrams: NGrams) -> Floats:
    """log(samples / samples whose references have the n-gram), of each row: (M,). An n-gram that no
    reference has counts as one that a single sample's have."""
    of_reference = captions.is_reference[ngrams.captions]
    samples = captions.sample_of[ngrams.captions[of_reference]]
    keys = np.unique(samples * ngrams.num_distinct + ngrams.ngrams[of_reference])
    frequency = np.bincount(keys % max(ngrams.num_distinct, 1), minlength=ngrams.num_distinct)
    rarity: Floats = np.log(max(len(captions.positions), 1) / np.maximum(frequency, 1))
    return rarity[ngrams.ngrams]
