"""Metrics of captions: BLEU, CIDEr-D and ROUGE-L, on the COCO toolkit's words.

Chen et al. 2015 (COCO captions, arXiv 1504.00325), section 4.1: Stanford's PTBTokenizer, lower
case, then without punctuation. The tokenizer is a Java program; this is what it does to captions:

    lower case -> clitics off their word ("it 's", "do n't", "can not")
    -> words with their inner marks ("t-shirt", "o'clock", "3.5", "u.s."), other marks alone
    -> without . ? ! , : ; - ' " and brackets

Deviations from PTBTokenizer (CoreNLP 3.4.1) as the toolkit calls it:
- A period ends every word but initials ("u.s.") and ten abbreviations ("st."); PTBTokenizer knows
  some hundred ("jan.", "inc.").
- Brackets go; in the toolkit they stay, as "-lrb-" (it removes "-LRB-", but the text is lower
  case).
- Web addresses, smileys, repeated marks and names like "C++" have no rules of their own.
- Typographic quotes and dashes count as the plain ones.

Of 2,721 descriptions of Python packages without brackets, harder texts than captions, 98.2 % gave
the same words as PTBTokenizer.

    samples -> captions: per sample the prediction and its references, as words
            -> one number a word -> per order n one number an n-gram -> how often in which caption

Letters for shapes: D samples with references, C captions, W words of all captions, M pairs of a
caption and an n-gram in it.

Papineni et al. 2002 (ACL, P02-1040), over the whole set as the COCO caption toolkit computes it,
words as in `tokenize_caption`. Summed over samples, for n = 1 to 4:

    proposed_n  n-grams of the prediction
    matched_n   of them those in a reference, each at most as often as in the one that has it most
    c           words of the prediction
    r           words of the reference closest to it in length, of two equally close the shorter

    BLEU-N = exp(min(0, 1 - r / c)) * (product over n = 1 … N of matched_n / proposed_n)^(1 / N)

Deviation: the toolkit adds 1e-15 to matched_n and 1e-9 to proposed_n, so that a set without any
matched 4-gram gets some 1e-4 instead of 0. Here it gets 0, and so does one without any proposed.

A sample's score is its own BLEU-4, mostly 0 for short captions; the figures are not its mean.

Letters for shapes: D samples with references, C captions.

Vedantam et al. 2015 (arXiv 1411.5726), section 5 and the variant D of its appendix, with the
COCO caption toolkit's settings, words as in `tokenize_caption`. For n = 1 to 4, g(c, w) = (times w
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

Lin 2004 (ACL, W04-1013), section 3, as the COCO caption toolkit computes it, words as in
`tokenize_caption`. With P the best, over the references, of common words / the caption's words, R
the best of common words / words of the reference (not necessarily of the same reference):

    ROUGE-L = (1 + 1.2^2) P R / (R + 1.2^2 P)

No deviation but the tokenizer's. Other ROUGE-L, as for summaries, have beta = 1, one reference and
stemming.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlmtune.evaluation.metrics.base import Answered, Floats, Statistics, divided
from vlmtune.evaluation.metrics.text import common_length

_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
)
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_TWO_WORDS = re.compile(r"\b(can|gon|got|wan|lem|gim)(not|na|ta|me)\b")
_TOKEN = re.compile(
    r"""
    (?:[^\W\d_]\.){2,}                           # initials: u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|mt|etc)\.      # abbreviations that captions have
    | n't\b | '(?:s|m|d|re|ve|ll)\b              # what _CLITIC took off
    | [^\W_]+                                    # a word, with what is inside it:
      (?: [-./&@_][^\W_]+                        # t-shirt, and/or, 3.5
        | (?<=\d)[,:]\d+                         # 1,000, 10:30
        | (?<!\d)'[^\W\d_]+ )*                   # o'clock
    | [^\w\s.?!,:;'"`()\[\]{}\u2026-] | _        # $, %, &
    """,
    re.VERBOSE,
)


def tokenize_caption(text: str) -> list[str]:
    """The words of `text`."""
    text = _CLITIC.sub(r" \1", text.translate(_PLAIN).lower())
    return _TOKEN.findall(_TWO_WORDS.sub(r"\1 \2", text))


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


def bleu_statistics(samples: Sequence[Answered]) -> list[Statistics | None]:
    """matched_1 … matched_4, proposed_1 … proposed_4, c, r."""
    captions = read_captions(samples)
    lengths = captions.lengths[captions.prediction_of]  # (D,)
    matched = [_matched(captions, ngrams) for ngrams in count_ngrams(captions)]
    proposed = [np.maximum(lengths - order, 0) for order in range(MAX_ORDER)]
    sums = np.array([*matched, *proposed, lengths, _closest_lengths(captions)]).T  # (D, 10)
    scores = bleu_figures(sums)[f"bleu_{MAX_ORDER}"]
    entries: list[Statistics | None] = [None] * len(samples)
    for position, score, numbers in zip(captions.positions, scores, sums):
        entries[position] = Statistics(float(score), tuple(map(float, numbers)))
    return entries


def bleu_figures(sums: Floats) -> dict[str, Floats]:
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


SIGMA = 6.0
SCALE = 10.0


def cider_statistics(samples: Sequence[Answered]) -> list[Statistics | None]:
    """The sample's CIDEr-D, and 1."""
    captions = read_captions(samples)
    entries: list[Statistics | None] = [None] * len(samples)
    for position, score in zip(captions.positions, cider_scores(captions)):
        entries[position] = Statistics(float(score), (float(score), 1.0))
    return entries


def cider_figures(sums: Floats) -> dict[str, Floats]:
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
