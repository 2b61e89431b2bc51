"""What the formats share: the keys around the turns, the pictures beside them, the checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmtune.data.media import shorten
from vlmtune.data.types import Conversation, Image, Part, Role, Source, Text, Turn
from vlmtune.errors import SampleError

KNOWN_KEYS = frozenset(
    {"id", "messages", "conversations", "images", "image", "answers", "question_type", "options"}
)
PLACEHOLDER = "<image>"

_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


@dataclass(frozen=True)
class Row:
    """One JSON object of a data file; `fallback_id` is its name where it has no `id`."""

    values: dict[str, Any]
    source: Source
    base_dir: Path
    fallback_id: str

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
    refs: list[str] = field(init=False)
    num_taken: int = 0

    def __post_init__(self) -> None:
        values = self.row.values
        if values.get("image") is not None and values.get("images") is not None:
            raise self.row.error("both image and images are given", expected="one of them")
        given = values.get("images")
        if given is None:
            given = values.get("image")
        given = [] if given is None else [given] if isinstance(given, str) else given
        if not isinstance(given, list):
            raise self.row.error(
                "images cannot be used", got=describe(given), expected="a path or a list of paths"
            )
        self.refs = [image_ref(ref, self.row) for ref in given]

    def take(self) -> Image:
        self.num_taken += 1
        if self.num_taken > len(self.refs):
            # Counted on: `check_all_taken` reports how many placeholders there are in all.
            return Image("", self.row.base_dir)
        return Image(self.refs[self.num_taken - 1], self.row.base_dir)

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
        if self.num_taken != len(self.refs):
            raise self.row.error(
                "pictures and image placeholders do not match",
                got=f"{len(self.refs)} in image(s), {self.num_taken} placeholders in the turns",
                expected="one picture for each placeholder",
            )


def describe(value: object) -> str:
    """What a JSON value is, for a message: its type and, where short, its content."""
    kind = _TYPE_NAMES.get(type(value), type(value).__name__)
    if isinstance(value, (dict, list)) or value is None:
        return kind
    return f"{kind}: {shorten(repr(value), 60)}"


def image_ref(ref: object, row: Row) -> str:
    if not isinstance(ref, str) or not ref.strip():
        raise row.error(
            "a picture's reference cannot be used",
            got=describe(ref),
            expected="a path, a data: URL or base64",
        )
    return ref


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
            if any(isinstance(part, Image) for part in turn.parts):
                raise row.error(
                    f"turn {number} ({turn.role}) holds a picture",
                    expected="pictures in user turns only",
                )
            if not turn.text.strip():
                raise row.error(f"turn {number} ({turn.role}) is empty", expected="a text")
        elif not turn.parts or not (turn.text.strip() or has_image(turn)):
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


def has_image(turn: Turn) -> bool:
    return any(isinstance(part, Image) for part in turn.parts)
