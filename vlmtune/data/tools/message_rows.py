"""Writes a conversation as a row of the format `messages`, its pictures as files beside the output.

Conversation -> turns as role and content
  a file         -> its path relative to the output, or with `copy` a copy
  bytes, base64  -> a file in OUT_images/, named by its content
  a URL          -> stays one, or with `copy` the file that was fetched
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmtune.data.dataset import OpenFile
from vlmtune.data.locations import HEAD_BYTES, content_kind, is_inside, is_url
from vlmtune.data.media import content_digest, locate_image, locate_media, reading_picture
from vlmtune.data.types import Conversation, Image, Media, Part, Source, Text, Turn, Video
from vlmtune.errors import VlmtuneError, at
from vlmtune.files import digest, file_state, whole_file

SUFFIXES = {
    "a PNG": ".png",
    "a JPEG": ".jpg",
    "a GIF": ".gif",
    "a BMP": ".bmp",
    "a TIFF": ".tif",
    "a WebP": ".webp",
}
NAME_DIGITS = 32
MAX_REMEMBERED = 100_000
"""Files whose names are remembered, so that each is read once."""
_LOOKS_OTHERWISE = ("data:", "file:", "http:", "https:")


@dataclass
class MediaFiles:
    """Where the pictures and videos of the rows in `output` are. `copy`: all of them in
    OUT_images/; else files stay where they are."""

    output: Path
    copy: bool
    num_written: int = 0
    num_outside: int = 0
    _names: dict[tuple[str, int, int], str] = field(default_factory=dict, repr=False)
    _above: Path = field(init=False)
    _real_above: Path = field(init=False)

    def __post_init__(self) -> None:
        self._above = Path(os.path.abspath(self.output)).parent
        self._real_above = Path(os.path.realpath(self._above))

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.stem}_images")

    def place(self, image: Image) -> str:
        """What the row says for `image`. Raises VlmtuneError where there is none, or where a file
        cannot be written (`CannotWrite`)."""
        if image.content is None and is_url(image.ref) and not self.copy:
            locate_media(image)
            return image.ref
        found = locate_image(image)
        if isinstance(found, bytes):
            name = digest(found)[:NAME_DIGITS]
            return self._written(found, name + _suffix(found[:HEAD_BYTES], image.ref))
        if not self.copy:
            return self._reference(found)
        return self._written(found, self._name(image, found))

    def _reference(self, found: Path) -> str:
        path = os.path.abspath(found)
        if not is_inside(path, self._real_above):
            self.num_outside += 1
        is_below = Path(path).is_relative_to(self._above)
        ref = os.path.relpath(path, self._above if is_below else self._real_above)
        ref = Path(ref).as_posix()
        return f"./{ref}" if ref.lower().startswith(_LOOKS_OTHERWISE) else ref

    def _name(self, image: Image, found: Path) -> str:
        """By content; a file that many rows use is read once."""
        key = file_state(found)
        if key not in self._names:
            if len(self._names) >= MAX_REMEMBERED:
                self._names.clear()
            digits = content_digest(image)[:NAME_DIGITS]
            self._names[key] = digits + _suffix(_head(found), str(found))
        return self._names[key]

    def _written(self, content: bytes | Path, name: str) -> str:
        target = self.folder / name
        if not target.exists():
            with writing(target), whole_file(target, sync=False) as stream:
                if isinstance(content, bytes):
                    stream.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, stream)
            self.num_written += 1
        return f"{self.folder.name}/{name}"


class CannotWrite(VlmtuneError):
    """The output cannot be written; no fault of a row."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into one that names `path`."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(
            f"the output cannot be written ({error.strerror or error})",
            file=path,
            do="free some space, or give another --output; the same command then continues",
        ) from error


def check_free(output: Path, files: Sequence[OpenFile], *, overwrite: bool) -> None:
    """Raise VlmtuneError where `output` is one of the files that are read, or exists and is not to
    be overwritten; make its folder."""
    inputs = [path for file in files for path in (file.rows.file, file.entry.annotations) if path]
    if output.resolve() in (Path(path).resolve() for path in inputs):
        raise VlmtuneError(
            "the output is one of the inputs", file=output, do="give another --output"
        )
    if output.exists() and not overwrite:
        raise VlmtuneError(
            "the output exists already", file=output, do="give another --output, or --overwrite"
        )
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)


def row_of(conversation: Conversation, places: MediaFiles) -> dict[str, Any]:
    """The row that reads back as an equal conversation.

    Raises SampleError where a picture cannot be had, CannotWrite where its file cannot be written.
    """
    row: dict[str, Any] = {"id": conversation.id}
    if conversation.question_type is not None:
        row["question_type"] = conversation.question_type
    if conversation.answers:
        row["answers"] = list(conversation.answers)
    if conversation.options:
        row["options"] = list(conversation.options)
    row["messages"] = [_turn(turn, conversation.source, places) for turn in conversation.turns]
    return row


def line_of(row: dict[str, Any]) -> bytes:
    """The row as a line of JSONL."""
    try:
        text = json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # a file name that is not UTF-8
        text = json.dumps(row).encode("ascii")
    return text + b"\n"


def _turn(turn: Turn, source: Source, places: MediaFiles) -> dict[str, Any]:
    row: dict[str, Any] = {"role": turn.role}
    if all(isinstance(part, Text) for part in turn.parts):
        row["content"] = turn.text
    else:
        row["content"] = [_part(part, source, places) for part in turn.parts]
    if turn.weight == 0:
        row["train"] = False
    elif turn.weight != 1:
        row["weight"] = turn.weight
    return row


def _part(part: Part, source: Source, places: MediaFiles) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    with at(source), reading_picture():
        if isinstance(part, Image):
            return {"type": "image", "image": places.place(part)}
        return {"type": "video", "video": _video(part, places)}


def _video(video: Video, places: MediaFiles) -> str | list[str]:
    if isinstance(video.ref, str):
        return places.place(_as_image(video, video.ref))
    return [places.place(_as_image(video, ref)) for ref in video.ref]


def _as_image(media: Media, ref: str) -> Image:
    return Image(ref, media.base_dir, media.content, media.media_policy)


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(HEAD_BYTES)


def _suffix(head: bytes, name: str) -> str:
    """By what the bytes are; else the name's own, where it has one."""
    kind = content_kind(head)
    if kind in SUFFIXES:
        return SUFFIXES[kind]
    suffix = Path(name).suffix.lower() if len(name) < 1000 else ""
    return suffix if suffix[1:].isalnum() and len(suffix) <= 6 else ".bin"
