"""The pictures and texts of a data set, and the rank of every query in both directions.

    blocks, first pass  -> picture to text: done within a row
                        -> text to picture: each text's best relevant score
    blocks, second pass -> text to picture: how many pictures score above it, how many the same

Memory is one block and numbers per query. The rank of a query is that of its best-ranked relevant
item, so a picture with five captions is right at K if any of them is among the first K, and each
caption is a query of its own (the rule for Flickr30k and COCO: Karpathy & Fei-Fei 2015, arXiv
1412.2306, section 4.1; five captions as in Faghri et al. 2018, arXiv 1707.05612).

Deviations:
- Ties. The usual code sorts, so that an item of the same score comes before or after the right one
  by its position, and a scorer that says nothing can look perfect. Here tied items stand in random
  order: R@K is a probability, rank and reciprocal rank are expectations under it.
- The median of an even number of ranks is the mean of the two in the middle; the usual code rounds
  it down.

Letters for shapes: b pictures of a block, M texts, N pictures.

Rows of the same pictures, by content, are one picture with several captions; the same caption in
several rows is one text that is right for all of their pictures. So a text that is also true of
another picture, in other words, still counts as wrong there, as in the usual benchmarks.

Deviation from the usual evaluation of Flickr30k and COCO: there every caption is an item of its
own, also where two are the same string; then one of the two is wrong though nothing could tell.

Letters for shapes: Q queries, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmtune.data.pairs import picture_key
from vlmtune.data.types import Conversation, Text, Turn
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError
from vlmtune.evaluation.metrics.base import (
    CHUNK_NUMBERS,
    Floats,
    Interval,
    bootstrap_intervals,
    divided,
    interval_of,
    resample_weights,
)
from vlmtune.evaluation.references import MAX_ERRORS_SHOWN, reference_answer

CUTOFFS = (1, 5, 10)
NUM_TOP = 5

Integers = NDArray[np.int64]
Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Block:
    """Scores (b, M) of the texts for the pictures numbered `pictures` (b,); higher is better.

    `prior` (M,) is subtracted where texts are ranked for a picture, not where pictures are ranked
    for a text.
    """

    pictures: Integers
    scores: Scores
    prior: Scores | None = None

    @property
    def to_texts(self) -> Scores:
        return self.scores if self.prior is None else self.scores - self.prior

    def check(self) -> None:
        """Raise VlmtuneError for a score that is not a number: it has no rank."""
        wrong = np.isnan(self.to_texts).any(axis=1)
        if wrong.any():
            raise VlmtuneError(
                "a retrieval score is not a number (NaN)",
                got=f"picture number {int(self.pictures[wrong][0])} of the set",
                do="check for overflow: use --dtype float32, or lower train.learning_rate",
            )


Blocks = Callable[[], Iterable[Block]]
"""The blocks of this process, each time anew and the same."""

Gather = Callable[[list[Any]], list[Any]]
"""The concatenation of every process's list, on every process (a collective)."""


@dataclass(frozen=True)
class Relevance:
    """Which texts are right for which picture: `texts_of[picture]`, never empty."""

    texts_of: tuple[tuple[int, ...], ...]
    num_texts: int

    @property
    def num_pictures(self) -> int:
        return len(self.texts_of)

    @cached_property
    def pictures_of(self) -> tuple[tuple[int, ...], ...]:
        of_text: list[list[int]] = [[] for _ in range(self.num_texts)]
        for picture, texts in enumerate(self.texts_of):
            for text in texts:
                of_text[text].append(picture)
        return tuple(tuple(pictures) for pictures in of_text)

    def mask(self, pictures: Integers) -> NDArray[np.bool_]:
        """(b, M): whether a text is right for a picture."""
        mask = np.zeros((len(pictures), self.num_texts), dtype=bool)
        for row, picture in enumerate(pictures):
            mask[row, list(self.texts_of[picture])] = True
        return mask


@dataclass(frozen=True)
class Ranked:
    """A query's result. `recalls` are the probabilities of a relevant item among the first 1, 5
    and 10; `top` are the best items with their scores."""

    recalls: tuple[float, ...]
    rank: float
    reciprocal_rank: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Rankings:
    """`texts[picture]` is the picture's query for texts, `pictures[text]` the text's for
    pictures."""

    texts: tuple[Ranked, ...]
    pictures: tuple[Ranked, ...]


def rank_blocks(blocks: Blocks, relevance: Relevance, *, gather: Gather = list) -> Rankings:
    """The ranks of all queries from every process's blocks, on every process.

    Two collectives with several processes; together their blocks hold each picture once.
    """
    ranked: dict[int, Ranked] = {}
    best = np.full(relevance.num_texts, -np.inf, dtype=np.float32)  # (M,)
    for block in blocks():
        relevant = relevance.mask(block.pictures)  # (b, M)
        ranked |= dict(_rank_texts(block, relevant))
        np.maximum(best, np.where(relevant, block.scores, -np.inf).max(axis=0), out=best)
    gathered = gather([(ranked, best)])
    ranked = {picture: rank for part, _ in gathered for picture, rank in part.items()}
    assert len(ranked) == relevance.num_pictures, "a picture without a row of scores"
    best = np.max([part for _, part in gathered], axis=0)
    tallies = gather([_tally(blocks(), relevance, best)])
    counts = np.sum([part for part, _ in tallies], axis=0)  # (3, M)
    top = _Top.merged([part for _, part in tallies])
    pictures = [
        _ranked(*(int(count) for count in counts[:, text]), top=top.of(text))
        for text in range(relevance.num_texts)
    ]
    return Rankings(tuple(ranked[n] for n in range(len(ranked))), tuple(pictures))


def rank_with_ties(
    num_above: int, num_relevant: int, num_irrelevant: int
) -> tuple[tuple[float, ...], float, float]:
    """Recalls at `CUTOFFS`, expected rank and expected reciprocal rank of the first of
    `num_relevant` items that stand in random order with `num_irrelevant` others, behind
    `num_above`.

    With X others before the first relevant one, P(X >= k + 1) = P(X >= k) * (m - k) / (m + r - k).
    """
    m, r = num_irrelevant, num_relevant
    assert r > 0, "a query without a relevant item has no rank"
    if m == 0:
        rank = num_above + 1
        return tuple(float(rank <= cutoff) for cutoff in CUTOFFS), float(rank), 1 / rank
    steps = np.arange(m, dtype=np.float64)
    at_least = np.concatenate([[1.0], np.cumprod((m - steps) / (m + r - steps)), [0.0]])  # (m + 2,)
    recalls = tuple(
        float(1 - at_least[min(max(cutoff - num_above, 0), m + 1)]) for cutoff in CUTOFFS
    )
    exactly = at_least[:-1] - at_least[1:]  # (m + 1,)
    reciprocal = float((exactly / (num_above + 1 + np.arange(m + 1))).sum())
    return recalls, num_above + 1 + m / (r + 1), reciprocal


def _rank_texts(block: Block, relevant: NDArray[np.bool_]) -> Iterator[tuple[int, Ranked]]:
    scores = block.to_texts
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)  # (b, 1)
    tied = scores == best
    counts = np.stack(
        [
            (scores > best).sum(axis=1),
            (tied & relevant).sum(axis=1),
            (tied & ~relevant).sum(axis=1),
        ]
    )  # (3, b)
    for row, picture in enumerate(block.pictures):
        above, right, wrong = (int(count) for count in counts[:, row])
        yield int(picture), _ranked(above, right, wrong, top=_best_of_row(scores[row]))


def _best_of_row(scores: Scores) -> tuple[tuple[int, float], ...]:
    """The best items of a row, the first of equals first; without sorting the whole row."""
    kept = min(NUM_TOP, len(scores))
    threshold = np.partition(scores, -kept)[-kept]
    candidates = np.flatnonzero(scores >= threshold)
    order = candidates[np.argsort(-scores[candidates], kind="stable")[:kept]]
    return tuple((int(item), float(scores[item])) for item in order)


def _tally(blocks: Iterable[Block], relevance: Relevance, best: Scores) -> tuple[Integers, _Top]:
    """Per text: pictures above its best relevant score, right ones at it, wrong ones at it (3, M);
    and its best pictures."""
    counts = np.zeros((3, relevance.num_texts), dtype=np.int64)
    top = _Top.empty(relevance.num_texts)
    for block in blocks:
        relevant = relevance.mask(block.pictures)
        tied = block.scores == best
        counts[0] += (block.scores > best).sum(axis=0)
        counts[1] += (tied & relevant).sum(axis=0)
        counts[2] += (tied & ~relevant).sum(axis=0)
        items = np.repeat(block.pictures[:, None], relevance.num_texts, axis=1)
        top = _Top.merged([top, _Top(items, block.scores)])
    return counts, top


@dataclass(frozen=True)
class _Top:
    """The best items of many queries at once, (up to `NUM_TOP`, M)."""

    items: Integers
    scores: Scores

    @classmethod
    def empty(cls, num_queries: int) -> _Top:
        return cls(
            np.zeros((0, num_queries), dtype=np.int64), np.zeros((0, num_queries), np.float32)
        )

    @classmethod
    def merged(cls, parts: Sequence[_Top]) -> _Top:
        """The best of all parts; of equals the one with the lower number, in whatever order."""
        items = np.concatenate([part.items for part in parts])
        scores = np.concatenate([part.scores for part in parts])
        order = np.lexsort((items, -scores), axis=0)[:NUM_TOP]
        return cls(np.take_along_axis(items, order, 0), np.take_along_axis(scores, order, 0))

    def of(self, query: int) -> tuple[tuple[int, float], ...]:
        return tuple(
            (int(item), float(score))
            for item, score in zip(self.items[:, query], self.scores[:, query])
        )


def _ranked(
    num_above: int, num_relevant: int, num_irrelevant: int, *, top: tuple[tuple[int, float], ...]
) -> Ranked:
    recalls, rank, reciprocal = rank_with_ties(num_above, num_relevant, num_irrelevant)
    return Ranked(recalls, rank, reciprocal, top)


@dataclass(frozen=True)
class TextItem:
    """A text; `conversation` is the first row that has it, as its last turn. `number` counts the
    texts that are that row's, from 0."""

    text: str
    conversation: Conversation
    number: int


@dataclass(frozen=True)
class RetrievalItems:
    """`pictures` are the first row of each picture (of each tuple of pictures, where rows have
    several): its question is the one the picture is shown with."""

    pictures: tuple[Conversation, ...]
    texts: tuple[TextItem, ...]
    relevance: Relevance


def retrieval_items(conversations: Sequence[Conversation]) -> RetrievalItems:
    """The items of all rows; a row's texts are its last assistant turn and its `answers`.

    Reads the picture files. Raises SampleError, or an ErrorGroup, for rows without a picture
    or without a text.
    """
    pictures: dict[str, Conversation] = {}
    texts: dict[str, TextItem] = {}
    relevant: dict[str, dict[str, None]] = {}
    errors: list[VlmtuneError] = []
    for conversation in conversations:
        try:
            key, captions = _key(conversation), captions_of(conversation)
        except VlmtuneError as error:
            errors.append(error)
            continue
        pictures.setdefault(key, conversation)
        number = 0
        for caption in captions:
            if caption not in texts:
                texts[caption] = TextItem(caption, answered(conversation, caption), number)
                number += 1
            relevant.setdefault(key, {})[caption] = None
    if errors:
        raise errors[0] if len(errors) == 1 else ErrorGroup(errors[:MAX_ERRORS_SHOWN])
    if not pictures:
        raise VlmtuneError("no rows to retrieve from")
    numbers = {text: number for number, text in enumerate(texts)}
    texts_of = tuple(tuple(numbers[text] for text in relevant[key]) for key in pictures)
    return RetrievalItems(
        tuple(pictures.values()), tuple(texts.values()), Relevance(texts_of, len(texts))
    )


def captions_of(conversation: Conversation) -> tuple[str, ...]:
    """A row's texts, each once. Raises SampleError where there is none."""
    written = [reference_answer(conversation) or "", *conversation.answers]
    captions = tuple(dict.fromkeys(text.strip() for text in written if text.strip()))
    if not captions:
        raise _error(conversation, "row has no text to retrieve", "an assistant turn, or `answers`")
    return captions


def answered(conversation: Conversation, text: str) -> Conversation:
    """The conversation with `text` as its last turn."""
    turns = conversation.turns
    asked = turns[:-1] if turns[-1].role == "assistant" else turns
    return replace(conversation, turns=(*asked, Turn("assistant", (Text(text),))))


def _key(conversation: Conversation) -> str:
    if not conversation.images:
        raise _error(conversation, "row has no picture to retrieve", "a picture")
    return picture_key(conversation)


def _error(conversation: Conversation, message: str, expected: str) -> SampleError:
    source = conversation.source
    return SampleError(message, at=source, expected=expected)


RECALLS = tuple(f"r{cutoff}" for cutoff in CUTOFFS)
FIGURES = (*RECALLS, "median_rank", "mrr")
"""In this order; `median_rank` alone is better where it is lower."""


def direction_figures(
    ranked: Sequence[Ranked], *, clusters: Sequence[Hashable], seed: int
) -> dict[str, Interval]:
    """The figures of a direction's queries (Q); `clusters[i]` is the picture of query i."""
    sums = np.array([(*query.recalls, query.reciprocal_rank, 1.0) for query in ranked])
    intervals = bootstrap_intervals(sums, figures=_means, clusters=clusters, seed=seed)
    ranks = np.array([query.rank for query in ranked])
    intervals["median_rank"] = median_interval(ranks, clusters=clusters, seed=seed)
    return {name: intervals[name] for name in FIGURES}


def median_interval(ranks: Floats, *, clusters: Sequence[Hashable], seed: int) -> Interval:
    """The median of `ranks` (Q,) with its interval over resampled pictures."""
    order = np.argsort(ranks)
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    of_query = np.array([numbers[cluster] for cluster in clusters])[order]  # (Q,)
    rows = max(1, CHUNK_NUMBERS // len(ranks))
    medians = [
        _medians(ranks[order], weights[start : start + rows, of_query])
        for weights in resample_weights(len(numbers), seed=seed)
        for start in range(0, len(weights), rows)
    ]
    value = float(np.median(ranks))
    return Interval(value, *interval_of(np.concatenate(medians), value), len(ranks))


def _medians(ranks: Floats, counts: Floats) -> Floats:
    """The medians (R,) of ascending `ranks` (Q,) that are drawn `counts` (R, Q) times."""
    below = np.cumsum(counts, axis=1)  # (R, Q)
    total = below[:, -1]
    lower, upper = (
        ranks[(below <= place[:, None]).sum(axis=1)]
        for place in (np.floor((total - 1) / 2), np.floor(total / 2))
    )
    middle: Floats = (lower + upper) / 2
    return middle


def _means(sums: Floats) -> dict[str, Floats]:
    names = (*RECALLS, "mrr")
    return {name: divided(sums[..., i], sums[..., -1]) for i, name in enumerate(names)}
