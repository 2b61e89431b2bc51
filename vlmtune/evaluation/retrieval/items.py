"""The pictures and texts of a data set, each once, and which belong together.

Rows of the same pictures, by content, are one picture with several captions; the same caption in
several rows is one text that is right for all of their pictures. So a text that is also true of
another picture, in other words, still counts as wrong there, as in the usual benchmarks.

Deviation from the usual evaluation of Flickr30k and COCO: there every caption is an item of its
own, also where two are the same string; then one of the two is wrong though nothing could tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlmtune.data.pairs import picture_key
from vlmtune.data.types import Conversation, Text, Turn
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError
from vlmtune.evaluation.references import MAX_ERRORS_SHOWN, reference_answer
from vlmtune.evaluation.retrieval.ranking import Relevance


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
    return SampleError(message, file=source.file, line=source.line, expected=expected)
