"""A row of a data file, and what all formats share: names, texts, media."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlmtune.data.types import (
    LOCAL,
    Conversation,
    Image,
    Media,
    MediaPolicy,
    Part,
    Role,
    Source,
    Text,
    Turn,
    Video,
)
from vlmtune.errors import SampleError, describe, shorten
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
    media_policy: MediaPolicy = LOCAL

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
            at=self.source,
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
                f"{place} contains half a character (a lone surrogate)",
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
            at=conversation.source,
            got="`answers` only" if conversation.answers else last.role,
            expected="a last turn of the assistant, to learn from",
            do="add the turn; `answers` alone are for evaluation",
        )
    if not any(turn.weight for turn in conversation.turns if turn.role == "assistant"):
        raise SampleError(
            "there is nothing to learn: no assistant turn is trained on",
            at=conversation.source,
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
                do="alternate user and assistant turns; a system turn may only come first",
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
            f"turn {number} ({turn.role}) contains a {kind}",
            expected=f"{kind}s in user turns only",
        )
    if not turn.text.strip():
        raise row.error(f"turn {number} ({turn.role}) is empty", expected="a text")


MediaKind = Literal["image", "video"]
NOUNS: dict[MediaKind, str] = {"image": "picture", "video": "video"}
MEDIA_KEYS = frozenset({"image", "images", "video", "videos"})
PLACEHOLDERS: dict[str, MediaKind] = {"<image>": "image", "<video>": "video"}


@dataclass
class MediaPlaceholders:
    """The pictures and videos listed beside the turns, handed out in order to the placeholders.

    `placeholders`: the words that stand for one, and of what; other words are text.
    """

    row: Row
    given: dict[MediaKind, Sequence[Media]]
    placeholders: dict[str, MediaKind]
    num_taken: dict[MediaKind, int] = field(default_factory=lambda: {"image": 0, "video": 0})

    def take(self, kind: MediaKind) -> Media:
        self.num_taken[kind] += 1
        if self.num_taken[kind] > len(self.given[kind]):
            # Counted on: `check_all_taken` reports how many placeholders there are in all.
            return Image("", self.row.base_dir)
        return self.given[kind][self.num_taken[kind] - 1]

    def has_placeholder(self, text: str) -> bool:
        """Whether something stands in for a picture or a video in `text`."""
        return any(word in text for word in self.placeholders)

    def split(self, text: str) -> list[Part]:
        """`text` with each placeholder replaced by the next picture or video.

        One line break beside a placeholder goes with it, as LLaVA's own loader has it: the chat
        template puts its own separator there.
        """
        if not self.placeholders:
            return [Text(text)] if text else []
        pieces = re.split(f"({'|'.join(self.placeholders)})", text)
        parts: list[Part] = []
        for index, piece in enumerate(pieces):
            if index % 2:
                parts.append(self.take(self.placeholders[piece]))
                continue
            piece = piece.removeprefix("\n") if index > 0 else piece
            piece = piece.removesuffix("\n") if index < len(pieces) - 1 else piece
            if piece:
                parts.append(Text(piece))
        return parts

    def in_front(self) -> list[Part]:
        """All that is given, in order: for texts without placeholders."""
        return [self.take(kind) for kind, given in self.given.items() for _ in given]

    def check_all_taken(self) -> None:
        for kind, noun in NOUNS.items():
            given, taken = len(self.given[kind]), self.num_taken[kind]
            if given != taken:
                raise self.row.error(
                    f"{noun}s and {kind} placeholders do not match",
                    got=f"{given} in {kind}(s), {taken} placeholders in the turns",
                    expected=f"one {noun} for each placeholder",
                )


def media_placeholders(row: Row, *, always: bool) -> MediaPlaceholders:
    """What the row's `image(s)` and `video(s)` list.

    `always`: `<image>` and `<video>` are placeholders even where nothing is listed, so that a
    missing list is an error; otherwise the words then stand for themselves.
    """
    image = _listed(row, "image")
    given: dict[MediaKind, Sequence[Media]] = {
        # A table's empty cell: a placeholder without its picture is still an error.
        "image": [] if always and image == "" else pictures(image, row),
        "video": [video(value, row) for value in _videos(row)],
    }
    known = {word: kind for word, kind in PLACEHOLDERS.items() if always or given[kind]}
    return MediaPlaceholders(row, given, known)


def pictures(value: object, row: Row) -> list[Image]:
    """One picture or a list of them. None: no picture."""
    if value is None:
        return []
    return [picture(item, row) for item in (value if isinstance(value, list) else [value])]


def picture(value: object, row: Row) -> Image:
    """A picture as rows give it: a reference, its bytes, or `{bytes, path}` as in `datasets`."""
    name, content = _reference(
        value, row, noun="picture", expected="a path, a URL, a data: URL, base64 or bytes"
    )
    return Image(name, row.base_dir, content=content, media_policy=row.media_policy)


def video(value: object, row: Row) -> Video:
    """A video as rows give it: a file, its bytes, or the list of pictures that are its frames."""
    if isinstance(value, list):
        if not value:
            raise row.error("a video has no frames", expected="pictures in a list")
        frames = [picture(frame, row) for frame in value]
        if any(frame.content is not None for frame in frames):
            raise row.error(
                "a video's frames are given as bytes", expected="paths or data: URLs of pictures"
            )
        refs = tuple(frame.ref for frame in frames)
        return Video(refs, row.base_dir, media_policy=row.media_policy)
    name, content = _reference(
        value, row, noun="video", expected="a path, a URL, bytes or a list of frames"
    )
    return Video(name, row.base_dir, content=content, media_policy=row.media_policy)


def _reference(value: object, row: Row, *, noun: str, expected: str) -> tuple[str, bytes | None]:
    name: object = ""
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        name = value.get("path") or ""
        value = value.get("bytes") if value.get("bytes") is not None else name
    if isinstance(value, bytes) and isinstance(name, str):
        return row.text(name, place=f"a {noun}'s path"), value
    if not isinstance(value, str) or not value.strip():
        raise row.error(
            f"a {noun}'s reference cannot be used", got=describe(value), expected=expected
        )
    return row.text(value, place=f"a {noun}'s reference"), None


def _listed(row: Row, kind: MediaKind) -> object:
    """The value of `image` or `images` (`video`, `videos`)."""
    one, several = row.values.get(kind), row.values.get(f"{kind}s")
    if one is not None and several is not None:
        raise row.error(f"both {kind} and {kind}s are given", expected="one of them")
    return several if several is not None else one


def _videos(row: Row) -> list[object]:
    """A list under `video` is the frames of one; under `videos`, the videos."""
    value = _listed(row, "video")
    if value is None:
        return []
    return value if isinstance(value, list) and row.values.get("video") is None else [value]
