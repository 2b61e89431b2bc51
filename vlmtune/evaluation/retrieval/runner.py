"""Retrieval of texts by pictures and of pictures by texts, from a model to a report.

conversations -> items: pictures and texts, each once -> this process's rows of scores
              -> ranks of all queries -> figures of both directions -> EvalReport
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Literal, TypeVar

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.errors import ErrorGroup, VlmtuneError, nearest
from vlmtune.evaluation.generate import evaluating
from vlmtune.evaluation.metrics.base import Interval
from vlmtune.evaluation.references import picture_name, question_of
from vlmtune.evaluation.results import EvalReport
from vlmtune.evaluation.retrieval.ranking import (
    FIGURES,
    RECALLS,
    Blocks,
    Gather,
    Ranked,
    Rankings,
    RetrievalItems,
    direction_figures,
    rank_blocks,
    retrieval_items,
)
from vlmtune.evaluation.retrieval.scorers import embed_items, write_likelihoods
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import EvalSection

Direction = Literal["picture_to_text", "text_to_picture"]
DIRECTIONS: tuple[Direction, ...] = ("picture_to_text", "text_to_picture")


@dataclass(frozen=True)
class TopItem:
    """A text, or the name of a picture (of several joined by commas), among a query's best."""

    item: str
    score: float
    is_relevant: bool


@dataclass(frozen=True)
class RankedQuery:
    """One query. `images` are the picture that asks, or the pictures a text should find; `answers`
    are the texts, or the pictures' names, that are right. `scores` are R@1, R@5, R@10 and the
    reciprocal rank; all are expectations where scores are tied."""

    id: str
    direction: Direction
    images: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    rank: float
    scores: dict[str, float]
    top: tuple[TopItem, ...]

    def as_row(self) -> dict[str, object]:
        """With the fields of a `Prediction`, so that its readers can show it: the first of `top`
        as `prediction`, R@1 as `score`."""
        return {
            "id": self.id,
            "direction": self.direction,
            "images": self.images,
            "question": self.question,
            "answer": self.answers[0],
            "answers": self.answers,
            "options": (),
            "prediction": self.top[0].item,
            "score": self.scores["r1"],
            "scores": self.scores,
            "question_type": None,
            "rank": self.rank,
            "top": [
                {"item": top.item, "score": top.score, "is_relevant": top.is_relevant}
                for top in self.top
            ],
        }


def ranked_queries(rankings: Rankings, items: RetrievalItems) -> list[RankedQuery]:
    """A row a query: first the pictures', then the texts'."""
    images = [
        tuple(picture_name(image) for image in conversation.images)
        for conversation in items.pictures
    ]
    names = [", ".join(shown) for shown in images]
    texts = [item.text for item in items.texts]
    pictures_of = items.relevance.pictures_of
    rows = []
    for picture, ranked in enumerate(rankings.texts):
        conversation, right = items.pictures[picture], items.relevance.texts_of[picture]
        rows.append(
            RankedQuery(
                id=f"{conversation.id}:picture",
                direction="picture_to_text",
                images=images[picture],
                question=question_of(conversation),
                answers=tuple(texts[number] for number in right),
                rank=ranked.rank,
                scores=_scores(ranked),
                top=_top(ranked, texts, right),
            )
        )
    for number, ranked in enumerate(rankings.pictures):
        item, right = items.texts[number], pictures_of[number]
        suffix = f":{item.number}" if item.number else ""
        rows.append(
            RankedQuery(
                id=f"{item.conversation.id}:text{suffix}",
                direction="text_to_picture",
                images=tuple(name for picture in right for name in images[picture]),
                question=item.text,
                answers=tuple(names[picture] for picture in right),
                rank=ranked.rank,
                scores=_scores(ranked),
                top=_top(ranked, names, right),
            )
        )
    return rows


def _scores(ranked: Ranked) -> dict[str, float]:
    return {**dict(zip(RECALLS, ranked.recalls)), "mrr": ranked.reciprocal_rank}


def _top(ranked: Ranked, names: Sequence[str], right: Sequence[int]) -> tuple[TopItem, ...]:
    return tuple(TopItem(names[number], score, number in right) for number, score in ranked.top)


Made = TypeVar("Made")


def evaluate_retrieval(
    vlm: VLM,
    conversations: Sequence[Conversation],
    *,
    encoder: Encoder,
    section: EvalSection,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> EvalReport:
    """Rank all texts for every picture and all pictures for every text; the report is the same on
    every process. Its figures' counts are the numbers of pictures and of texts.

    With `world_size` processes each scores every `world_size`-th picture; `gather` is a collective.
    `on_progress` counts this process's pictures. `section.metrics` chooses among the figures.
    `seed` is the bootstrap's. Raises SampleError for rows that cannot be used, VlmtuneError for
    unknown figures and for scores that are NaN; all processes raise what one of them met.
    """
    wanted = wanted_figures(section.metrics)
    items = retrieval_items(conversations)
    exchange: Gather = list
    if world_size > 1:
        assert gather is not None, "several processes need a way to bring ranks together"
        exchange = gather
    with evaluating(vlm.model), tempfile.TemporaryFile() as file:
        blocks = _score(
            vlm, items, file, encoder, section, on_progress, rank, world_size, gather=exchange
        )
        rankings = rank_blocks(blocks, items.relevance, gather=exchange)
    figures = retrieval_figures(rankings, items, seed=seed)
    return EvalReport(
        task="retrieval",
        num_samples=len(conversations),
        metrics={name: figures[name] for name in wanted},
        slices={},
        predictions=ranked_queries(rankings, items),
    )


def retrieval_figures(
    rankings: Rankings, items: RetrievalItems, *, seed: int
) -> dict[str, Interval]:
    """`picture_to_text_r1`, …, `text_to_picture_mrr`, with intervals over resampled pictures.

    A text belongs to its picture; one that is right for several, to the first of them.
    """
    pictures_of = items.relevance.pictures_of
    clusters = (range(len(items.pictures)), [pictures[0] for pictures in pictures_of])
    queries = (rankings.texts, rankings.pictures)
    return {
        f"{direction}_{name}": interval
        for direction, ranked, of_query in zip(DIRECTIONS, queries, clusters)
        for name, interval in direction_figures(ranked, clusters=of_query, seed=seed).items()
    }


def _score(
    vlm: VLM,
    items: RetrievalItems,
    file: IO[bytes],
    encoder: Encoder,
    section: EvalSection,
    on_progress: Callable[[int], None] | None,
    rank: int,
    world_size: int,
    *,
    gather: Gather,
) -> Blocks:
    """The rows of this process's pictures by the section's scorer. Contains collectives."""
    if section.scorer == "likelihood":
        return _agreed(
            lambda: write_likelihoods(
                vlm,
                items,
                file,
                encoder=encoder,
                batch_size=section.batch_size,
                subtract_prior=section.subtract_prior,
                on_progress=on_progress,
                rank=rank,
                world_size=world_size,
            ),
            gather=gather,
        )
    embedded = _agreed(
        lambda: embed_items(
            vlm,
            items,
            encoder=encoder,
            prompt=section.embedding_prompt,
            batch_size=section.batch_size,
            on_progress=on_progress,
            rank=rank,
            world_size=world_size,
        ),
        gather=gather,
    )
    return embedded.blocks(gather=gather)


def _agreed(make: Callable[[], Made], *, gather: Gather) -> Made:
    """What `make` returns; where it raises on one process, all raise. One collective."""
    errors: list[VlmtuneError] = []
    made: list[Made] = []
    try:
        made.append(make())
    except VlmtuneError as error:
        errors.append(error)
    errors = gather(errors)
    if errors:
        raise errors[0] if len(errors) == 1 else ErrorGroup(errors)
    return made[0]


def wanted_figures(names: Sequence[str]) -> list[str]:
    """The figures called `names`, or all. Raises VlmtuneError for one that is none."""
    known = [f"{direction}_{figure}" for direction in DIRECTIONS for figure in FIGURES]
    for name in names:
        if name not in known:
            close = nearest(name, known)
            raise VlmtuneError(
                "unknown figure of retrieval" + (f"; did you mean '{close}'?" if close else ""),
                got=repr(name),
                expected=" or ".join(known),
            )
    return list(names) or known
