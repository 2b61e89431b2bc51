"""Evaluation of a model on a data set: generate, score, summarise, write.

conversations -> this process's share -> answers -> all processes' answers -> scores
              -> EvalReport: intervals over all samples and per question type -> two files
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.encode import Encoder
from vlmtune.data.media import locate_image
from vlmtune.data.types import Conversation, Image
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError
from vlmtune.evaluation.answers import KeptAnswers
from vlmtune.evaluation.generate import generate_answers
from vlmtune.evaluation.metrics.base import Answered, Metric, Statistics
from vlmtune.evaluation.metrics.bootstrap import Interval, bootstrap_intervals
from vlmtune.evaluation.metrics.registry import metrics_for
from vlmtune.evaluation.types import EvalReport, Prediction
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import EvalSection

MAX_ERRORS_SHOWN = 20

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
    kept: KeptAnswers | None = None,
    shown: Sequence[Conversation] | None = None,
) -> EvalReport:
    """Answer and score every conversation as `section` says; the report is the same on every
    process.

    `shown` are the conversations as the model sees them where that is not how they are scored and
    reported (blank pictures). `seed` is that of sampled answers and of the bootstrap; the other
    arguments are those of `answer_all`. Raises VlmtuneError for an unknown task or metric,
    SampleError for a conversation without a reference answer or one that cannot be encoded.
    """
    metrics_for(section.task, section.metrics)
    check_references(conversations)
    texts = answer_all(
        vlm,
        conversations if shown is None else shown,
        encoder=encoder,
        section=section,
        seed=seed,
        on_progress=on_progress,
        rank=rank,
        world_size=world_size,
        gather=gather,
        kept=kept,
    )
    return score_answers(
        conversations, texts, task=section.task, metrics=section.metrics, seed=seed
    )


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
    kept: KeptAnswers | None = None,
) -> list[str]:
    """The answer to every conversation, on every process.

    With `world_size` processes each answers every `world_size`-th conversation and `gather` (a
    collective, called once) brings the answers together, and the errors: all processes raise what
    one of them met. `kept` are answers of an earlier start, which are not generated again, and
    where new ones are kept. `on_progress` counts this process's answers, first the kept ones.
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

    errors: list[VlmtuneError] = []
    note({})
    try:
        generate_answers(
            vlm,
            [conversations[number] for number in missing],
            encoder=encoder,
            max_new_tokens=section.max_new_tokens,
            batch_size=section.batch_size,
            decoding=section.decoding,
            seed=seed,
            numbers=missing,
            on_answers=note,
        )
    except VlmtuneError as error:
        if world_size == 1:
            raise
        errors.append(error)
    if world_size > 1:
        assert gather is not None, "several processes need a way to bring answers together"
        gathered = gather([*errors, *answered.items()])
        errors = [item for item in gathered if isinstance(item, VlmtuneError)]
        answered = dict(item for item in gathered if not isinstance(item, VlmtuneError))
    if errors:
        raise ErrorGroup(errors)
    assert len(answered) == len(conversations)
    return [answered[number] for number in range(len(conversations))]


def score_answers(
    conversations: Sequence[Conversation],
    texts: Sequence[str],
    *,
    task: str,
    metrics: Sequence[str] = (),
    seed: int = 0,
) -> EvalReport:
    """The report of `texts` as answers to `conversations`, without a model."""
    chosen = metrics_for(task, metrics)
    answered = [
        Answered(text, reference_answer(conversation), conversation.answers, conversation.options)
        for conversation, text in zip(conversations, texts, strict=True)
    ]
    statistics = {name: metric.statistics(answered) for name, metric in chosen.items()}
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
        for index, (conversation, sample) in enumerate(zip(conversations, answered, strict=True))
    ]
    kinds = sorted({p.question_type for p in predictions if p.question_type is not None})
    slices = {None: range(len(predictions))} | {
        kind: [i for i, p in enumerate(predictions) if p.question_type == kind] for kind in kinds
    }
    summaries: dict[str | None, dict[str, Interval]] = {
        kind: _summarise(predictions, chosen, statistics, rows, seed=seed)
        for kind, rows in slices.items()
    }
    return EvalReport(
        task=task,
        num_samples=len(predictions),
        metrics=summaries[None],
        slices={kind: summaries[kind] for kind in kinds},
        predictions=predictions,
    )


def check_references(conversations: Sequence[Conversation]) -> None:
    """Raise for conversations without an answer to compare with: a SampleError, or an ErrorGroup of
    the first `MAX_ERRORS_SHOWN`."""
    errors = [
        SampleError(
            "sample has no reference answer",
            file=conversation.source.file,
            line=conversation.source.line,
            got=f"a last turn of role '{conversation.turns[-1].role}' and no `answers`",
            expected="a last turn of role 'assistant', or `answers`",
        )
        for conversation in conversations
        if reference_answer(conversation) is None and not conversation.answers
    ]
    if errors:
        raise errors[0] if len(errors) == 1 else ErrorGroup(errors[:MAX_ERRORS_SHOWN])


def reference_answer(conversation: Conversation) -> str | None:
    last = conversation.turns[-1]
    return last.text.strip() if last.role == "assistant" else None


def question_of(conversation: Conversation) -> str:
    """The text of the last user turn."""
    asked = [turn.text.strip() for turn in conversation.turns if turn.role == "user"]
    return asked[-1] if asked else ""


def picture_name(image: Image) -> str:
    """A picture's full path, or a digest where the data file itself holds the picture."""
    found = locate_image(image)
    return (
        str(found.absolute())
        if isinstance(found, Path)
        else f"sha256:{sha256(found).hexdigest()[:16]}"
    )


def write_report(
    report: EvalReport, folder: Path, *, about: Mapping[str, object] | None = None
) -> None:
    """`predictions.jsonl` (a line a sample) and `metrics.json` into `folder`; each file appears
    whole or not at all. `about` (what was evaluated, on what) goes into `metrics.json` too."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(p.as_row(), ensure_ascii=False) for p in report.predictions]
    write_whole(folder / "predictions.jsonl", "".join(line + "\n" for line in lines))
    summary = {**(about or {}), **report.summary()}
    write_whole(folder / "metrics.json", json.dumps(summary, indent=2) + "\n")


def _summarise(
    predictions: Sequence[Prediction],
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
                clusters=[_cluster(predictions[row]) for row, _ in scored],
                seed=seed,
            )
    return summary


def _cluster(prediction: Prediction) -> Hashable:
    """Samples on the same pictures belong together; one without a picture stands alone."""
    return prediction.images or (prediction.id,)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
