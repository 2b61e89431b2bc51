"""A sample of a WebDataset shard: files of one name and several endings, as one row.

    cat/007.jpg, cat/007.json, cat/007.txt
      -> {"__key__": "cat/007", "image": bytes, …the fields of the json…, "text": …}

`jpg`, `png` and the like: the picture, or with several the list `images`; `mp4` and the like:
`video`; `json`: its fields, or where it is a list, `messages`; `txt`: `text`; `caption`; `cls`:
`label`; `NAME.txt`: the field NAME. Nothing else is read, and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vlmtune.data.sources.json_text import load_json, reason
from vlmtune.data.text import describe
from vlmtune.data.types import Source
from vlmtune.errors import SampleError

PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"})
VIDEOS = frozenset({"mp4", "webm", "mkv", "mov", "avi"})
_TEXTS = {"txt": "text", "text": "text", "caption": "caption", "cls": "label"}
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<ending>[^/]+)", re.DOTALL)


class Member(NamedTuple):
    """A file of a sample: its name in the tar file and its ending, in small letters."""

    name: str
    ending: str
    content: bytes


def members_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Every member in turn, at constant memory. Raises what tarfile does for a broken file."""
    while (member := tar.next()) is not None:
        # tarfile keeps each member that it passes, in a list that its type stubs do not name.
        tar.members = []  # type: ignore[attr-defined]
        yield member


def split_name(name: str) -> tuple[str, str] | None:
    """The key and the ending of a file's name; the ending starts at the first dot of its last
    part. None where it has none, or is hidden."""
    match = _NAME.fullmatch(name)
    return (match["key"], match["ending"].lower()) if match else None


def is_read(ending: str) -> bool:
    """Whether files of this ending are part of a row."""
    last = ending.rsplit(".", 1)[-1]
    return last in PICTURES | VIDEOS or last == "txt" or ending in _TEXTS or ending == "json"


def row_of(key: str, members: Sequence[Member], source: Source) -> dict[str, Any]:
    """The row of a sample's files. Raises SampleError with the sample's key where a file is not
    UTF-8, its json is none, or two files give one field."""
    row: dict[str, Any] = {"__key__": key}
    pictures: list[Member] = []
    for member in members:
        last = member.ending.rsplit(".", 1)[-1]
        if last in PICTURES:
            pictures.append(member)
        elif last in VIDEOS:
            _put(row, {"video": member.content}, member, source)
        elif member.ending == "json":
            _put(row, _fields(member, source), member, source)
        elif last == "txt" or member.ending in _TEXTS:
            name = _TEXTS.get(member.ending, member.ending.removesuffix(".txt"))
            _put(row, {name: _text(member, source).strip()}, member, source)
    if pictures:
        _put_pictures(row, pictures, source)
    return row


def _put(row: dict[str, Any], fields: dict[str, Any], member: Member, source: Source) -> None:
    for name, value in fields.items():
        if name in row and row[name] != value:
            raise _error(f"the sample has two values of {name}", member, source)
        row[name] = value


def _put_pictures(row: dict[str, Any], pictures: list[Member], source: Source) -> None:
    """The pictures in the order in which the json names them, else in that of their names."""
    named = row.pop("images", None)
    if named is None:
        named = row.pop("image", None)
    named = [] if named is None else named if isinstance(named, list) else [named]
    by_name = {picture.name.rsplit("/", 1)[-1]: picture for picture in pictures}
    if named:
        bases = [name.rsplit("/", 1)[-1] if isinstance(name, str) else name for name in named]
        strange = [name for name in bases if not isinstance(name, str) or name not in by_name]
        if strange:
            raise SampleError(
                "the json names a picture that the sample does not hold",
                file=source.file,
                line=source.line,
                got=describe(strange[0]),
                expected=", ".join(by_name),
            )
        pictures = [by_name[name] for name in bases]
    else:
        pictures = sorted(pictures, key=lambda picture: picture.name)
    contents = [{"bytes": picture.content, "path": picture.name} for picture in pictures]
    row.update({"image": contents[0]} if len(contents) == 1 else {"images": contents})


def _fields(member: Member, source: Source) -> dict[str, Any]:
    try:
        value = load_json(member.content)
    except UnicodeDecodeError as error:
        raise _error("the json is not UTF-8", member, source) from error
    except json.JSONDecodeError as error:
        what = f"the json cannot be read ({error.msg}, column {error.colno})"
        raise _error(what, member, source) from error
    except (ValueError, RecursionError) as error:
        raise _error(f"the json cannot be read ({reason(error)})", member, source) from error
    if isinstance(value, list):
        return {"messages": value}
    if not isinstance(value, dict):
        raise _error(f"the json is {describe(value)}", member, source)
    return value


def _text(member: Member, source: Source) -> str:
    try:
        return member.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _error("the text is not UTF-8", member, source) from error


def _error(what: str, member: Member, source: Source) -> SampleError:
    return SampleError(what, file=source.file, line=source.line, got=member.name)
