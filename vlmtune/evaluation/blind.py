"""Guessers that never see the picture: what a figure is worth without looking.

majority answer  the most frequent answer to the question's text in the training data; to a text
                 that is not there, the most frequent answer of all (the priors of Antol et al.
                 2015, arXiv 1505.00468, section 4, taken to the single question)
blank pictures   the model itself, each picture replaced by mid-grey of the same size
"""

from __future__ import annotations

import base64
import io
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import PIL.Image

from vlmtune.data.media import upright_size
from vlmtune.data.types import Conversation, Image, Part, Turn
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.references import question_of

GREY = 128


def majority_answers(training: Sequence[Conversation], asked: Sequence[Conversation]) -> list[str]:
    """What the training data's most frequent answers make of each question asked; of equally
    frequent ones the first seen. Raises VlmtuneError where no training sample has an answer."""
    of_text: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for conversation in training:
        for question, answer in _exchanges(conversation):
            of_text[question][answer] += 1
            overall[answer] += 1
    if not overall:
        raise VlmtuneError(
            "the training data holds no answer to guess from",
            do="name the file that was trained on with --train",
        )
    counts = (of_text.get(question_of(conversation), overall) for conversation in asked)
    return [count.most_common(1)[0][0] for count in counts]


def blanked(conversation: Conversation) -> Conversation:
    """The conversation with each picture mid-grey."""
    turns = tuple(
        Turn(turn.role, tuple(_blank(part) for part in turn.parts)) for turn in conversation.turns
    )
    return replace(conversation, turns=turns)


def _exchanges(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Each question's text with the answer to it."""
    turns = conversation.turns
    for before, turn in zip(turns, turns[1:]):
        if before.role == "user" and turn.role == "assistant":
            yield before.text.strip(), turn.text.strip()
    if turns[-1].role == "user" and conversation.answers:
        yield turns[-1].text.strip(), Counter(conversation.answers).most_common(1)[0][0]


def _blank(part: Part) -> Part:
    if not isinstance(part, Image):
        return part
    # The model has seen the picture already, within the limit of pixels.
    width, height = upright_size(part, max_pixels=sys.maxsize)
    return Image(_grey_picture(width, height), part.base_dir)


@lru_cache(maxsize=1024)
def _grey_picture(width: int, height: int) -> str:
    stream = io.BytesIO()
    PIL.Image.new("L", (width, height), GREY).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
