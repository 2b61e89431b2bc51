"""Retrieval of texts by pictures and of pictures by texts, from a model to a report.

conversations -> items: pictures and texts, each once -> this process's rows of scores
              -> ranks of all queries -> figures of both directions -> EvalReport
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import IO, TypeVar

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.errors import ErrorGroup, VlmtuneError, nearest
from vlmtune.evaluation.generate import evaluating
from vlmtune.evaluation.metrics.bootstrap import Interval
from vlmtune.evaluation.retrieval.embedding import embed_items
from vlmtune.evaluation.retrieval.figures import FIGURES, direction_figures
from vlmtune.evaluation.retrieval.items import RetrievalItems, retrieval_items
from vlmtune.evaluation.retrieval.likelihood import write_likelihoods
from vlmtune.evaluation.retrieval.queries import DIRECTIONS, ranked_queries
from vlmtune.evaluation.retrieval.ranking import Blocks, Gather, Rankings, rank_blocks
from vlmtune.evaluation.types import EvalReport
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import EvalSection

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
