"""Evaluation of a model on a data set: every process answers its share, all get the report.

conversations -> this process's share -> answers -> all processes' answers -> scoring.py
              -> EvalReport -> results.py writes it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.errors import ErrorGroup, VlmtuneError
from vlmtune.evaluation.answers import KeptAnswers
from vlmtune.evaluation.choice import choose_by_likelihood
from vlmtune.evaluation.generate import generate_answers
from vlmtune.evaluation.metrics.registry import CHOICE_LIKELIHOOD, metrics_for
from vlmtune.evaluation.prompts import SharedPictures
from vlmtune.evaluation.references import answered_sample, check_references
from vlmtune.evaluation.references import picture_name as picture_name
from vlmtune.evaluation.results import write_report as write_report
from vlmtune.evaluation.retrieval.items import retrieval_items
from vlmtune.evaluation.retrieval.runner import evaluate_retrieval, wanted_figures
from vlmtune.evaluation.scoring import score_answers
from vlmtune.evaluation.types import EvalReport
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import EvalSection

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
    kept: KeptAnswers | None = None,
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
    kept: KeptAnswers | None = None,
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
