"""What a conversation asks and what is right, as metrics and reports take it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlmtune.data.media import locate_image
from vlmtune.data.types import Conversation, Image
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError, plural, shorten
from vlmtune.evaluation.metrics.base import Answered, Metric
from vlmtune.evaluation.metrics.choice import reference_options
from vlmtune.evaluation.metrics.registry import CHOICE_LIKELIHOOD, TASKS, metrics_for
from vlmtune.files import digest

MAX_ERRORS_SHOWN = 20


CHOICE_METRICS = {"multiple_choice", CHOICE_LIKELIHOOD}


def check_references(
    conversations: Sequence[Conversation], *, task: str = "vqa", metrics: Sequence[str] = ()
) -> None:
    """Raise for conversations that cannot be scored: without an answer to compare with, or, where a
    choice is scored, without options or with a reference that is none of them.

    A SampleError, or an ErrorGroup of the first `MAX_ERRORS_SHOWN`. A VlmtuneError where no metric
    applies to any of them.
    """
    is_choice = task == "choice" and bool(CHOICE_METRICS & set(metrics or TASKS[task]))
    found = (_problem(conversation, is_choice=is_choice) for conversation in conversations)
    errors = [error for error in found if error is not None]
    if errors:
        raise errors[0] if len(errors) == 1 else ErrorGroup(errors[:MAX_ERRORS_SHOWN])
    measured = metrics_for(task, metrics)
    samples = [answered_sample(conversation, "") for conversation in conversations]
    if measured and not any(_applies(metric, samples) for metric in measured.values()):
        raise VlmtuneError(
            f"there is nothing to measure: no sample has what {', '.join(measured)} needs",
            got=plural(len(samples), "sample"),
            do="choose another task or other metrics; docs/metrics.md says what each needs",
        )


def answered_sample(conversation: Conversation, text: str) -> Answered:
    """`text` as the answer to a conversation, with what it is compared with."""
    return Answered(
        text, reference_answer(conversation), conversation.answers, conversation.options
    )


def _problem(conversation: Conversation, *, is_choice: bool) -> SampleError | None:
    sample = answered_sample(conversation, "")
    place: dict[str, Any] = {"file": conversation.source.file, "line": conversation.source.line}
    if not sample.references:
        return SampleError(
            "sample has no reference answer",
            got=f"a last turn of role '{conversation.turns[-1].role}' and no `answers`",
            expected="a last turn of role 'assistant', or `answers`",
            **place,
        )
    if is_choice and not sample.options:
        return SampleError("sample has no options to choose from", expected="`options`", **place)
    if is_choice and not reference_options(sample):
        # Where the last turn is the reference, `answers` are not looked at.
        got = sample.references if sample.answer is None else (sample.answer,)
        return SampleError(
            "the reference matches none of the options, or several",
            got=", ".join(repr(shorten(text, 40)) for text in got[:3]),
            expected="the text of one option, or its letter",
            **place,
        )
    return None


def _applies(metric: Metric, samples: Sequence[Answered]) -> bool:
    """Whether to any sample; mostly known from the first one."""
    return any(metric.statistics([sample])[0] is not None for sample in samples)


def reference_answer(conversation: Conversation) -> str | None:
    last = conversation.turns[-1]
    return last.text.strip() if last.role == "assistant" else None


def question_of(conversation: Conversation) -> str:
    """The text of the last user turn."""
    asked = [turn.text.strip() for turn in conversation.turns if turn.role == "user"]
    return asked[-1] if asked else ""


def media_names(conversation: Conversation) -> tuple[str, ...]:
    """What tells the pictures and videos of a conversation from others, in no words for people."""
    names = [picture_name(image) for image in conversation.images]
    for video in conversation.videos:
        refs = video.ref if isinstance(video.ref, tuple) else (video.ref,)
        files = (Image(ref, video.base_dir, video.content, video.media_policy) for ref in refs)
        names += map(picture_name, files)
    return tuple(names)


def picture_name(image: Image) -> str:
    """A picture's full path, or a digest where the data file itself holds the picture."""
    found = locate_image(image)
    return str(found.absolute()) if isinstance(found, Path) else f"sha256:{digest(found)[:16]}"


Item = TypeVar("Item")


def fixed_subset(items: Sequence[Item], num: int | None, *, seed: int) -> list[Item]:
    """`num` of `items` in their order, chosen by `seed` alone; all where there are no more."""
    if num is None or num >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), num))]


def check_some_left(key: str, *, num_left: int, num_given: int) -> None:
    """Raise VlmtuneError where none of the samples under a key of the recipe can be used: nothing
    would be measured, and it would not be seen."""
    if num_given and not num_left:
        raise VlmtuneError(
            f"{key}: no sample is left to evaluate on",
            got=f"{num_given:,} of {num_given:,} left out",
            do="`vlmtune check` says what is wrong with each",
        )
