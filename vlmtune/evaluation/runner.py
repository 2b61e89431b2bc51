"""Evaluation of a model on a data set: every process answers its share, all get the report.

conversations, texts -> statistics of each metric -> sums over all samples and over each type
                     -> figures with bootstrap intervals -> EvalReport

conversations -> this process's share -> answers -> all processes' answers -> score
              -> EvalReport -> results.py writes it
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.errors import ErrorGroup, VlmtuneError
from vlmtune.evaluation.answer_log import AnswerLog
from vlmtune.evaluation.generate import generate_answers
from vlmtune.evaluation.likelihood import choice_statistics, choose_by_likelihood
from vlmtune.evaluation.metrics.base import Interval, Mean, Metric, Statistics, bootstrap_intervals
from vlmtune.evaluation.metrics.registry import CHOICE_LIKELIHOOD, metrics_for
from vlmtune.evaluation.prompts import SharedPictures
from vlmtune.evaluation.references import (
    answered_sample,
    check_references,
    media_names,
    picture_name,
    question_of,
)
from vlmtune.evaluation.results import EvalReport, Prediction
from vlmtune.evaluation.retrieval.ranking import retrieval_items
from vlmtune.evaluation.retrieval.runner import evaluate_retrieval, wanted_figures
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import EvalSection


def score_answers(
    conversations: Sequence[Conversation],
    texts: Sequence[str],
    *,
    task: str,
    metrics: Sequence[str] = (),
    seed: int = 0,
    chosen: Sequence[int] | None = None,
) -> EvalReport:
    """The report of `texts` as answers to `conversations`, without a model. `chosen` are the
    numbers of the options that the model found likeliest."""
    by_name = metrics_for(task, metrics)
    samples = [answered_sample(c, text) for c, text in zip(conversations, texts, strict=True)]
    statistics = {name: metric.statistics(samples) for name, metric in by_name.items()}
    if chosen is not None:
        by_name[CHOICE_LIKELIHOOD] = Mean(CHOICE_LIKELIHOOD, lambda sample: None)
        statistics[CHOICE_LIKELIHOOD] = choice_statistics(conversations, chosen)
    predictions = [
        Prediction(
            id=conversation.id,
            images=tuple(picture_name(image) for image in conversation.images),
            question=question_of(conversation),
            answer=sample.answer,
            answers=sample.answers,
            options=sample.options,
            prediction=sample.prediction,
            scores={n: s.score for n, of in statistics.items() if (s := of[index]) is not None},
            question_type=conversation.question_type,
        )
        for index, (conversation, sample) in enumerate(zip(conversations, samples, strict=True))
    ]
    # Samples on the same pictures or videos belong together; one without any stands alone.
    clusters = [media_names(conversation) or (conversation.id,) for conversation in conversations]
    kinds = sorted({p.question_type for p in predictions if p.question_type is not None})
    slices = {None: range(len(predictions))} | {
        kind: [i for i, p in enumerate(predictions) if p.question_type == kind] for kind in kinds
    }
    summaries: dict[str | None, dict[str, Interval]] = {
        kind: _summarise(clusters, by_name, statistics, rows, seed=seed)
        for kind, rows in slices.items()
    }
    return EvalReport(
        task=task,
        num_samples=len(predictions),
        metrics=summaries[None],
        slices={kind: summaries[kind] for kind in kinds},
        predictions=predictions,
    )


def _summarise(
    clusters: Sequence[Hashable],
    metrics: Mapping[str, Metric],
    statistics: Mapping[str, Sequence[Statistics | None]],
    rows: Iterable[int],
    *,
    seed: int,
) -> dict[str, Interval]:
    """The figures over `rows` of each metric that applies to at least one of them."""
    rows = list(rows)
    summary: dict[str, Interval] = {}
    for name, metric in metrics.items():
        scored = [(row, s) for row in rows if (s := statistics[name][row]) is not None]
        if scored:
            summary |= bootstrap_intervals(
                np.array([s.sums for _, s in scored], dtype=np.float64),
                figures=metric.figures,
                clusters=[clusters[row] for row, _ in scored],
                seed=seed,
            )
    return summary


Made = TypeVar("Made")

Gather = Callable[[list[Any]], list[Any]]
"""The concatenation of every process's list, on every process (a collective)."""


def evaluate(
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
    kept: AnswerLog | None = None,
    shown: Sequence[Conversation] | None = None,
) -> EvalReport:
    """Answer and score every conversation as `section` says, or rank pictures and texts for
    retrieval; the report is the same on every process.

    `shown` are the conversations as the model sees them where that is not how they are scored and
    reported (blank pictures). `seed` is that of sampled answers and of the bootstrap; the other
    arguments are those of `answer_all`. Raises VlmtuneError for an unknown task or metric,
    SampleError for a conversation without a reference answer or one that cannot be encoded.
    """
    if section.task == "retrieval":
        if on_progress is not None:
            on_progress(0)
        return evaluate_retrieval(
            vlm,
            conversations,
            encoder=encoder,
            section=section,
            seed=seed,
            on_progress=on_progress,
            rank=rank,
            world_size=world_size,
            gather=gather,
        )
    generated = metrics_for(section.task, section.metrics)
    check_references(conversations, task=section.task, metrics=section.metrics)
    asked = conversations if shown is None else shown
    pictures = SharedPictures(vlm)
    chosen = None
    if CHOICE_LIKELIHOOD in section.metrics:
        share = range(rank, len(asked), world_size)
        mine, errors = _tried(
            lambda: choose_by_likelihood(
                vlm,
                [asked[number] for number in share],
                encoder=encoder,
                batch_size=section.batch_size,
                on_progress=None if generated else on_progress,
                pictures=pictures,
            )
        )
        chosen = _brought_together(
            dict(zip(share, mine or [])), errors, len(asked), world_size, gather
        )
    if chosen is None or generated:
        texts = answer_all(
            vlm,
            asked,
            encoder=encoder,
            section=section,
            seed=seed,
            on_progress=on_progress,
            rank=rank,
            world_size=world_size,
            gather=gather,
            kept=kept,
            pictures=pictures,
        )
    else:
        texts = [c.options[number] for c, number in zip(conversations, chosen, strict=True)]
    return score_answers(
        conversations,
        texts,
        task=section.task,
        metrics=section.metrics,
        seed=seed,
        chosen=chosen,
    )


def figure_names(conversations: Sequence[Conversation], section: EvalSection) -> list[str]:
    """The names of the figures that `evaluate` has for these conversations; no model is asked.
    Raises VlmtuneError for an unknown task or metric."""
    if section.task == "retrieval":
        return wanted_figures(section.metrics)
    names: list[str] = []
    for name, metric in metrics_for(section.task, section.metrics).items():
        for conversation in conversations:
            if metric.statistics([answered_sample(conversation, "")])[0] is not None:
                one = score_answers([conversation], [""], task=section.task, metrics=[name])
                names += one.metrics
                break
    return names + [CHOICE_LIKELIHOOD] * (CHOICE_LIKELIHOOD in section.metrics)


def num_to_do(
    conversations: Sequence[Conversation], task: str, *, rank: int, world_size: int
) -> int:
    """What a process's `on_progress` counts up to: answers, or pictures in retrieval."""
    num = len(conversations)
    if task == "retrieval":
        num = len(retrieval_items(conversations).pictures)
    return len(range(rank, num, world_size))


def answer_all(
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
    kept: AnswerLog | None = None,
    pictures: SharedPictures | None = None,
) -> list[str]:
    """The answer to every conversation, on every process.

    With `world_size` processes each answers every `world_size`-th conversation and `gather` (a
    collective, called once) brings the answers together, and the errors: all processes raise what
    one of them met. `kept` are answers of an earlier start, which are not generated again, and
    where new ones are kept. `on_progress` counts this process's answers, first the kept ones.
    `pictures` are those of the evaluation that this is part of.
    """
    share = range(rank, len(conversations), world_size)
    answered = {n: kept.texts[n] for n in share if kept is not None and n in kept.texts}
    missing = [number for number in share if number not in answered]

    def note(texts: Mapping[int, str]) -> None:
        answered.update(texts)
        if kept is not None:
            kept.append(texts)
        if on_progress is not None:
            on_progress(len(answered))

    note({})
    _, errors = _tried(
        lambda: generate_answers(
            vlm,
            [conversations[number] for number in missing],
            encoder=encoder,
            max_new_tokens=section.max_new_tokens,
            batch_size=section.batch_size,
            decoding=section.decoding,
            seed=seed,
            numbers=missing,
            on_answers=note,
            pictures=pictures,
        )
    )
    return _brought_together(answered, errors, len(conversations), world_size, gather)


def _tried(make: Callable[[], Made]) -> tuple[Made | None, list[VlmtuneError]]:
    """What `make` returns, or the error that it raises."""
    try:
        return make(), []
    except VlmtuneError as error:
        return None, [error]


def _brought_together(
    mine: Mapping[int, Made],
    errors: Sequence[VlmtuneError],
    num: int,
    world_size: int,
    gather: Gather | None,
) -> list[Made]:
    """What all processes have made, 0 to `num` - 1, on each of them. All raise what one of them
    met. With several processes a collective."""
    gathered: list[Any] = [*errors, *mine.items()]
    if world_size > 1:
        assert gather is not None, "several processes need a way to bring answers together"
        gathered = gather(gathered)
    found = [item for item in gathered if isinstance(item, VlmtuneError)]
    if found:
        raise found[0] if world_size == 1 else ErrorGroup(found)
    made = dict(gathered)
    assert len(made) == num
    return [made[number] for number in range(num)]
