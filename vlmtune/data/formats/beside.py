"""The pictures and videos of a row: listed beside its turns, or held by one of their parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from vlmtune.data.formats.rows import Row
from vlmtune.data.text import describe
from vlmtune.data.types import Image, Media, Part, Text, Video

MediaKind = Literal["image", "video"]
NOUNS: dict[MediaKind, str] = {"image": "picture", "video": "video"}
MEDIA_KEYS = frozenset({"image", "images", "video", "videos"})
PLACEHOLDERS: dict[str, MediaKind] = {"<image>": "image", "<video>": "video"}


@dataclass
class MediaBeside:
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


def media_beside(row: Row, *, always: bool) -> MediaBeside:
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
    return MediaBeside(row, given, known)


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
    return Image(name, row.base_dir, content=content, access=row.access)


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
        return Video(refs, row.base_dir, access=row.access)
    name, content = _reference(
        value, row, noun="video", expected="a path, a URL, bytes or a list of frames"
    )
    return Video(name, row.base_dir, content=content, access=row.access)


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
