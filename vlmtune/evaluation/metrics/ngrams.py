"""Captions with their references, and the n-grams of them all, counted at once.

    samples -> captions: per sample the prediction and its references, as words
            -> one number a word -> per order n one number an n-gram -> how often in which caption

Letters for shapes: D samples with references, C captions, W words of all captions, M pairs of a
caption and an n-gram in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmtune.evaluation.metrics.base import Answered, Floats
from vlmtune.evaluation.metrics.tokenize import tokenize_caption

Integers = NDArray[np.int64]
MAX_ORDER = 4


@dataclass(frozen=True)
class Captions:
    """All captions of the samples that have references. Captions are numbered sample by sample, the
    prediction first."""

    positions: list[int]
    """Per sample with references, where it stands in the list of samples."""
    words: list[list[str]]
    sample_of: Integers  # (C,)
    prediction_of: Integers  # (D,): which caption is the sample's prediction

    @property
    def is_reference(self) -> NDArray[np.bool_]:  # (C,)
        mask = np.ones(len(self.words), dtype=bool)
        mask[self.prediction_of] = False
        return mask

    @property
    def lengths(self) -> Integers:  # (C,), in words
        return np.array([len(words) for words in self.words], dtype=np.int64)


@dataclass(frozen=True)
class NGrams:
    """The n-grams of one order. Rows are sorted by caption, then by n-gram."""

    num_distinct: int
    captions: Integers  # (M,)
    ngrams: Integers  # (M,), below `num_distinct`
    counts: Integers  # (M,)


def read_captions(samples: Sequence[Answered]) -> Captions:
    """The captions of `samples` as words."""
    positions: list[int] = []
    words: list[list[str]] = []
    sample_of: list[int] = []
    prediction_of: list[int] = []
    for position, sample in enumerate(samples):
        if not sample.references:
            continue
        prediction_of.append(len(words))
        for text in (sample.prediction, *sample.references):
            sample_of.append(len(positions))
            words.append(tokenize_caption(text))
        positions.append(position)
    return Captions(
        positions,
        words,
        np.array(sample_of, dtype=np.int64),
        np.array(prediction_of, dtype=np.int64),
    )


def count_ngrams(captions: Captions) -> Iterator[NGrams]:
    """The n-grams of order 1, 2, …, `MAX_ORDER`."""
    numbers: dict[str, int] = {}
    words = np.array(
        [numbers.setdefault(word, len(numbers)) for caption in captions.words for word in caption],
        dtype=np.int64,
    )  # (W,)
    caption_of = np.repeat(np.arange(len(captions.words)), captions.lengths)  # (W,)
    ngrams, starts, num_distinct = words, np.arange(len(words)), len(numbers)
    for order in range(1, MAX_ORDER + 1):
        if order > 1:
            # An n-gram is one of the order below and the word after it, if of the same caption.
            ends = starts + order - 1
            inside = ends < len(words)
            inside[inside] = caption_of[ends[inside]] == caption_of[starts[inside]]
            starts = starts[inside]
            longer = ngrams[inside] * len(numbers) + words[starts + order - 1]
            distinct, ngrams = np.unique(longer, return_inverse=True)
            num_distinct = len(distinct)
        keys, counts = np.unique(caption_of[starts] * num_distinct + ngrams, return_counts=True)
        divisor = max(num_distinct, 1)
        yield NGrams(num_distinct, keys // divisor, keys % divisor, counts)


def values_at(keys: Integers, values: Floats, wanted: Integers) -> Floats:
    """The value of each of the `wanted` keys, 0 where it is not among the sorted `keys`."""
    if len(keys) == 0:
        return np.zeros(len(wanted))
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0.0)
