"""Answers to a report: scores of every sample, figures with intervals, per question type.

conversations, texts -> statistics of each metric -> sums over all samples and over each type
                     -> figures with bootstrap intervals -> EvalReport
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from vlmtune.data.types import Conversation
from vlmtune.evaluation.choice import choice_statistics
from vlmtune.evaluation.metrics.base import Mean, Metric, Statistics
from vlmtune.evaluation.metrics.bootstrap import Interval, bootstrap_intervals
from vlmtune.evaluation.metrics.registry import CHOICE_LIKELIHOOD, metrics_for
from vlmtune.evaluation.references import (
    answered_sample,
    media_names,
    picture_name,
    question_of,
)
from vlmtune.evaluation.types import EvalReport, Prediction


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
