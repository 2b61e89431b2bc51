"""A row of a data file, and what every format does with it: names it, reads texts, checks turns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.data.text import describe, shorten
from vlmtune.data.types import (
    LOCAL,
    Access,
    Conversation,
    Image,
    Part,
    Role,
    Source,
    Text,
    Turn,
    Video,
)
from vlmtune.errors import SampleError
from vlmtune.recipe.data_section import DataEntry

COMMON_KEYS = frozenset({"id", "answers", "question_type", "options", "__key__"})
"""Read in every format; `__key__` is a tar member's name, repeated from shard to shard."""


@dataclass(frozen=True)
class Row:
    """One row of a data file; `fallback_id` is its name where it has no `id`, `entry` what the
    recipe says of the file."""

    values: dict[str, Any]
    source: Source
    base_dir: Path
    fallback_id: str
    entry: DataEntry
    access: Access = LOCAL

    def error(
        self,
        message: str,
        *,
        got: object = None,
        expected: object = None,
        do: str | None = None,
    ) -> SampleError:
        """A SampleError that names this row's file and line."""
        return SampleError(
            message,
            file=self.source.file,
            line=self.source.line,
            got=got,
            expected=expected,
            do=do,
        )

    def text(self, value: object, *, place: str) -> str:
        """`value` where it is a text that can be encoded: JSON lets half an emoji through."""
        if not isinstance(value, str):
            raise self.error(f"{place} is not a text", got=describe(value), expected="a text")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(
                f"{place} holds half a character (a lone surrogate)",
                got=f"\\u{ord(value[error.start]):04x} at character {error.start + 1}",
                expected="whole characters",
            ) from error
        return value

    def written(self, value: object, *, place: str) -> str:
        """A text, or a number as text: tables and JSON hold answers as either."""
        is_finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        if is_finite and not isinstance(value, bool):
            return str(value)
        return self.text(value, place=place)

    def texts(self, value: object, *, place: str) -> tuple[str, ...]:
        """A list of texts. None: no text."""
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.error(
                f"{place} cannot be used", got=describe(value), expected="a list of texts"
            )
        return tuple(self.text(text, place=f"a text of {place}") for text in value)

    def id(self, key: str = "id") -> str:
        """What the row calls itself under `key`, or else the name of its place."""
        given = self.values.get(key)
        if given is None:
            return self.fallback_id
        if isinstance(given, float) and given.is_integer():
            given = int(given)  # as pandas has whole numbers in a column with gaps
        if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
            raise self.error(
                f"the {key} cannot be used",
                got=describe(given),
                expected="a text or a whole number",
            )
        return self.written(given, place=f"the {key}")

    @property
    def keys(self) -> str:
        """The row's keys, for a message."""
        return f"keys {listed(self.values)}" if self.values else "no keys"


def listed(keys: Iterable[object]) -> str:
    """Keys as a message names them."""
    text = ", ".join(map(str, keys))
    return shorten(text.encode("utf-8", "backslashreplace").decode("utf-8"), 200)


def merge_texts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring texts as one: templates differ in what they put between text parts."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and merged and isinstance(merged[-1], Text):
            merged[-1] = Text(merged[-1].text + part.text)
        else:
            merged.append(part)
    return tuple(merged)


def build_conversation(
    row: Row,
    turns: Sequence[Turn],
    *,
    id_key: str = "id",
    answers: Sequence[str] | None = None,
    question_type: str | None = None,
) -> Conversation:
    """The conversation of checked turns.

    `answers` and `question_type` are those of the row's own keys where none are given. Raises
    SampleError where the turns do not alternate, one is empty, or the last is not answered and
    there are no `answers` that tell what is right.
    """
    if answers is None:
        answers = row.texts(row.values.get("answers"), place="answers")
    if question_type is None and row.values.get("question_type") is not None:
        question_type = row.text(row.values["question_type"], place="question_type")
    _check_turns(row, turns, has_answers=bool(answers))
    return Conversation(
        id=row.id(id_key),
        turns=tuple(turns),
        source=row.source,
        answers=tuple(answers),
        question_type=question_type,
        options=row.texts(row.values.get("options"), place="options"),
    )


def check_trainable(conversation: Conversation) -> None:
    """Raise SampleError where there is nothing to learn: the last turn is not answered, or every
    answer has weight 0. Evaluation takes such a conversation, training does not."""
    last = conversation.turns[-1]
    if last.role != "assistant":
        raise SampleError(
            "there is no assistant turn"
            if all(turn.role != "assistant" for turn in conversation.turns)
            else "the last turn is not answered",
            file=conversation.source.file,
            line=conversation.source.line,
            got="`answers` only" if conversation.answers else last.role,
            expected="a last turn of the assistant, to learn from",
            do="add the turn; `answers` alone are for evaluation",
        )
    if not any(turn.weight for turn in conversation.turns if turn.role == "assistant"):
        raise SampleError(
            "there is nothing to learn: no assistant turn is trained on",
            file=conversation.source.file,
            line=conversation.source.line,
            got="`train: false` or `weight: 0` in each",
        )


def most_common(texts: Sequence[str]) -> str:
    """The text given most often, of several the first."""
    return Counter(texts).most_common(1)[0][0]


def has_media(turn: Turn) -> bool:
    return any(isinstance(part, (Image, Video)) for part in turn.parts)


def _check_turns(row: Row, turns: Sequence[Turn], *, has_answers: bool) -> None:
    expected: tuple[Role, ...] = ("system", "user")
    for number, turn in enumerate(turns, start=1):
        if turn.role not in expected:
            raise row.error(
                f"turn {number} has the wrong role for its place",
                got=turn.role,
                expected=" or ".join(expected),
                do="let user and assistant take turns, with system, if at all, first",
            )
        _check_turn(row, turn, number)
        expected = ("assistant",) if turn.role == "user" else ("user",)
    if turns[-1].role == "assistant" or (turns[-1].role == "user" and has_answers):
        return
    if not any(turn.role == "assistant" for turn in turns):
        raise row.error(
            "there is no assistant turn",
            got=", ".join(turn.role for turn in turns),
            expected="an answer to learn, or `answers` to compare with",
        )
    raise row.error("the last turn is not answered", got=turns[-1].role, expected="assistant")


def _check_turn(row: Row, turn: Turn, number: int) -> None:
    if turn.role == "user":
        if not (turn.text.strip() or has_media(turn)):
            raise row.error(f"turn {number} (user) is empty", expected="a text or a picture")
        return
    if has_media(turn):
        kind = "picture" if any(isinstance(part, Image) for part in turn.parts) else "video"
        raise row.error(
            f"turn {number} ({turn.role}) holds a {kind}",
            expected=f"{kind}s in user turns only",
        )
    if not turn.text.strip():
        raise row.error(f"turn {number} ({turn.role}) is empty", expected="a text")
