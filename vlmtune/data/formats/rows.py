"""What the formats share: the keys around the turns, the pictures beside them, the checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmtune.data.text import describe
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
from vlmtune.errors import SampleError, nearest
from vlmtune.recipe.schema import DataEntry

COMMON_KEYS = frozenset({"id", "answers", "question_type", "options"})
PICTURE_KEYS = frozenset({"images", "image"})
TURN_KEYS = ("messages", "conversations")
PLACEHOLDER = "<image>"


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

    @property
    def id(self) -> str:
        given = self.values.get("id")
        if given is None:
            return self.fallback_id
        if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
            raise self.error(
                "the id cannot be used", got=describe(given), expected="a text or a whole number"
            )
        return str(given)


@dataclass
class RowImages:
    """The pictures listed beside the turns, handed out in order to the placeholders."""

    row: Row
    given: list[Image] = field(init=False)
    num_taken: int = 0

    def __post_init__(self) -> None:
        values = self.row.values
        if values.get("image") is not None and values.get("images") is not None:
            raise self.row.error("both image and images are given", expected="one of them")
        given = values.get("images")
        if given is None:
            given = values.get("image")
        given = [] if given is None else given if isinstance(given, list) else [given]
        self.given = [picture(value, self.row) for value in given]

    def take(self) -> Image:
        self.num_taken += 1
        if self.num_taken > len(self.given):
            # Counted on: `check_all_taken` reports how many placeholders there are in all.
            return Image("", self.row.base_dir)
        return self.given[self.num_taken - 1]

    def split(self, text: str) -> list[Part]:
        """`text` with each `<image>` replaced by the next picture.

        One line break beside a placeholder goes with it, as LLaVA's own loader has it: the chat
        template puts its own separator there.
        """
        pieces = text.split(PLACEHOLDER)
        parts: list[Part] = []
        for index, piece in enumerate(pieces):
            if index > 0:
                parts.append(self.take())
                piece = piece.removeprefix("\n")
            if index < len(pieces) - 1:
                piece = piece.removesuffix("\n")
            if piece:
                parts.append(Text(piece))
        return parts

    def check_all_taken(self) -> None:
        if self.num_taken != len(self.given):
            raise self.row.error(
                "pictures and image placeholders do not match",
                got=f"{len(self.given)} in image(s), {self.num_taken} placeholders in the turns",
                expected="one picture for each placeholder",
            )


def picture(value: object, row: Row) -> Image:
    """A picture as rows give it: a reference, its bytes, or `{bytes, path}` as in `datasets`."""
    name = ""
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        name = value.get("path") or ""
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return Image(name, row.base_dir, content=value, access=row.access)
    if not isinstance(value, str) or not value.strip():
        raise row.error(
            "a picture's reference cannot be used",
            got=describe(value),
            expected="a path, a URL, a data: URL, base64 or bytes",
        )
    return Image(value, row.base_dir, access=row.access)


def turns_of(row: Row) -> list[dict[str, Any]]:
    """The objects in the row's `messages` or `conversations`. Raises SampleError."""
    given = [key for key in TURN_KEYS if key in row.values]
    if len(given) == 2:
        raise row.error("both messages and conversations are given", expected="one of them")
    if not given:
        close = next((key for key in row.values if nearest(key, TURN_KEYS)), None)
        raise row.error(
            "there are no messages",
            got=f"keys {', '.join(map(str, row.values))}" if row.values else "no keys",
            expected="messages or conversations",
            do=f"is {close!r} misspelt?" if close else None,
        )
    turns = row.values[given[0]]
    if not isinstance(turns, list):
        raise row.error(f"{given[0]} is not a list", got=describe(turns), expected="a list")
    if not turns:
        raise row.error(f"{given[0]} is empty", expected="turns")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise row.error(f"turn {number} is not an object", got=describe(turn))
    return turns


def has_turns_with(values: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Whether some turn of a row has one of `keys`; where turns have no keys at all, yes."""
    for name in TURN_KEYS:
        turns = values.get(name)
        if name in values and not isinstance(turns, list):
            return True  # its own parser says what is wrong
        objects = [turn for turn in turns or [] if isinstance(turn, dict) and turn]
        if name in values and (not objects or any(set(keys) & turn.keys() for turn in objects)):
            return True
    return False


def text_part(text: object, row: Row, *, place: str) -> Text:
    """`text` checked: a text that can be encoded (JSON lets half an emoji through)."""
    if not isinstance(text, str):
        raise row.error(f"{place} is not a text", got=describe(text), expected="a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise row.error(
            f"{place} holds half a character (a lone surrogate)",
            got=f"\\u{ord(text[error.start]):04x} at character {error.start + 1}",
            expected="whole characters",
        ) from error
    return Text(text)


def merge_texts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring texts as one: templates differ in what they put between text parts."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and merged and isinstance(merged[-1], Text):
            merged[-1] = Text(merged[-1].text + part.text)
        else:
            merged.append(part)
    return tuple(merged)


def build_conversation(row: Row, turns: Sequence[Turn]) -> Conversation:
    """The conversation of checked turns with the row's id, answers and question type."""
    _check_turns(row, turns)
    question_type = row.values.get("question_type")
    if question_type is not None and not isinstance(question_type, str):
        raise row.error(
            "question_type cannot be used", got=describe(question_type), expected="a text"
        )
    return Conversation(
        id=row.id,
        turns=tuple(turns),
        source=row.source,
        answers=_texts(row, "answers"),
        question_type=question_type,
        options=_texts(row, "options"),
    )


def _texts(row: Row, key: str) -> tuple[str, ...]:
    texts = row.values.get(key)
    if texts is None:
        return ()
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise row.error(f"{key} cannot be used", got=describe(texts), expected="a list of texts")
    return tuple(texts)


def _check_turns(row: Row, turns: Sequence[Turn]) -> None:
    expected: tuple[Role, ...] = ("system", "user")
    for number, turn in enumerate(turns, start=1):
        if turn.role not in expected:
            raise row.error(
                f"turn {number} has the wrong role for its place",
                got=turn.role,
                expected=" or ".join(expected),
                do="let user and assistant take turns, with system, if at all, first",
            )
        if turn.role in ("system", "assistant"):
            if has_media(turn):
                raise row.error(
                    f"turn {number} ({turn.role}) holds a picture",
                    expected="pictures in user turns only",
                )
            if not turn.text.strip():
                raise row.error(f"turn {number} ({turn.role}) is empty", expected="a text")
        elif not turn.parts or not (turn.text.strip() or has_media(turn)):
            raise row.error(f"turn {number} (user) is empty", expected="a text or a picture")
        expected = ("assistant",) if turn.role == "user" else ("user",)
    if not any(turn.role == "assistant" for turn in turns):
        raise row.error(
            "there is no assistant turn",
            got=", ".join(turn.role for turn in turns),
            expected="an answer to learn or to compare with",
        )
    if turns[-1].role != "assistant":
        raise row.error("the last turn is not answered", got=turns[-1].role, expected="assistant")


def has_media(turn: Turn) -> bool:
    return any(isinstance(part, (Image, Video)) for part in turn.parts)
