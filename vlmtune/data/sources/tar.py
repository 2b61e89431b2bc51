"""WebDataset shards: by number or from front to back; nothing is extracted.

    cat/007.jpg, cat/007.json, cat/007.txt
      -> {"__key__": "cat/007", "image": bytes, …the fields of the json…, "text": …}

`jpg`, `png` and the like: the picture, or with several the list `images`; `mp4` and the like:
`video`; `json`: its fields, or where it is a list, `messages`; `txt`: `text`; `caption`; `cls`:
`label`; `NAME.txt`: the field NAME. Nothing else is read, and nothing is unpickled.

A sample of a plain shard is where its files lie, and they are read when it is parsed: a block of
samples holds no pictures. Of a compressed one it is the files themselves. The files of a sample
must be next to each other; where they are not, each part counts as a sample.
"""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from vlmtune.data.sources.base import (
    RawRow,
    Stamp,
    in_pieces,
    open_table,
    read_span,
    stamp_of,
    unreadable,
)
from vlmtune.data.sources.json_text import load_json, reason
from vlmtune.data.sources.jsonl import open_bytes
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError, describe
from vlmtune.files import Extra, Numbers, Table

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
                "the json names a picture that the sample lacks",
                at=source,
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
    return SampleError(what, at=source, got=member.name)


logger = logging.getLogger("vlmtune")


@dataclass(frozen=True)
class TarRows:
    """The samples of a shard; `table` has the start and end of each, headers included."""

    path: Path
    stamp: Stamp
    table: Table

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return len(self.table)

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def read(self, index: int) -> Mapping[str, Any]:
        content = read_span(self.path, self.stamp, *self.table.row(index))
        # A piece of a tar file that starts at a header is itself one.
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            members = [
                (key, Member(member.name, ending, held.read()))
                for member, key, ending in _files(tar, Counter())
                if (held := tar.extractfile(member)) is not None
            ]
        return row_of(members[0][0], [member for _, member in members], self.place(index))


def open_tar(path: Path, *, cache_dir: Path) -> TarRows:
    """Raises VlmtuneError where the file is no tar file, is cut off, or its samples are not in one
    piece each. What is in it and not read is counted and said."""
    stamp = stamp_of(path)

    def build(extra: Extra) -> Iterable[Numbers]:
        return in_pieces(_scan(path, stamp.size, extra), columns=2)

    table = open_table("tar", [(path, stamp)], columns=2, build=build, cache_dir=cache_dir)
    if table.extra["not_read"]:
        kinds = ", ".join(
            f"{kind} ({num})" for kind, num in sorted(table.extra["not_read"].items())
        )
        logger.info("%s: unused files: %s", path, kinds)
    return TarRows(path, stamp, table)


def _scan(path: Path, size: int, extra: Extra) -> Iterator[tuple[int, int]]:
    not_read: Counter[str] = Counter()
    seen: set[int] = set()
    start, end, current = 0, 0, ""
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member, key, _ in _files(tar, not_read):
                if key != current:
                    if current:
                        yield start, end
                    start, current = member.offset, key
                    if hash(key) in seen:
                        raise VlmtuneError(
                            "the files of a sample are not next to each other",
                            file=path,
                            got=key,
                            do="create the tar file again with --sort=name",
                        )
                    seen.add(hash(key))
                end = tar.offset
            _check_end(path, tar.offset, size)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise VlmtuneError(
            f"the file cannot be read as a tar file ({error})",
            file=path,
            do="fetch or write the file again; it may be cut off",
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if current:
        yield start, end
    extra["not_read"] = dict(not_read)


def _files(
    tar: tarfile.TarFile, not_read: Counter[str]
) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """The files that belong to samples, with key and ending; the others are counted."""
    for member in members_of(tar):
        named = split_name(member.name)
        if member.isdir():
            continue
        if not member.isreg():
            not_read["links and the like"] += 1
        elif named is None:
            not_read["hidden or without an extension"] += 1
        elif not is_read(named[1]):
            not_read[f".{named[1]}"] += 1
        else:
            yield member, *named


def _check_end(path: Path, offset: int, size: int) -> None:
    """tarfile takes whatever is no header for the end; that must be zeros, or the file's end."""
    with path.open("rb") as stream:
        stream.seek(offset)
        if any(stream.read(tarfile.BLOCKSIZE)):
            raise VlmtuneError(
                f"the tar file is broken at byte {offset + 1}",
                file=path,
                got=f"no header there, {size - offset} bytes before the end",
                do="fetch or write the file again",
            )
    if offset >= size:
        logger.info("%s: the tar file has no end marker; it may be cut off", path)


NUM_LOOKED_AT = 100
"""Files of a shard that are looked at for such as are not read."""

COMPRESSED = (".tar.gz", ".tgz")


class Piece(NamedTuple):
    """Where a file of a sample lies in the shard."""

    name: str
    ending: str
    start: int
    num_bytes: int


@dataclass(frozen=True)
class TarShard:
    """The samples of a shard; a raw row holds a sample's key and its pieces, or, of a compressed
    shard, its members."""

    path: Path

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def rows(self, start: int) -> Iterator[RawRow]:
        read = self._compressed if self.path.name.lower().endswith(COMPRESSED) else self._plain
        try:
            yield from read(start)
        except (tarfile.TarError, ValueError) as error:
            raise self._broken(str(error)) from error

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        key, members = row.content
        if isinstance(members[0], Piece):
            members = self._members(members)
        return row_of(key, members, Source(self.file, row.line))

    def say_not_read(self) -> None:
        """Log the kinds of files, among the first of the shard, that are part of no sample."""
        kinds: Counter[str] = Counter()
        try:
            with open_bytes(self.path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in islice(tar, NUM_LOOKED_AT):
                    named = split_name(member.name)
                    if member.isreg() and (named is None or not is_read(named[1])):
                        kinds[f".{named[1]}" if named else "hidden or without an extension"] += 1
        except tarfile.TarError as error:
            raise self._broken(str(error)) from error
        if kinds:
            found = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
            logger.info("%s: unused files among the first %d: %s", self.path, NUM_LOOKED_AT, found)

    def _plain(self, start: int) -> Iterator[RawRow]:
        with open_bytes(self.path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for number, (key, files) in enumerate(
                groupby(_files_of_stream(tar), key=lambda file: file[0])
            ):
                pieces = [
                    Piece(info.name, ending, info.offset_data, info.size)
                    for _, ending, info in files
                ]
                if number >= start:
                    yield RawRow(number, number + 1, (key, pieces))
            stream.seek(tar.offset)
            self._check_end(stream.read(tarfile.BLOCKSIZE))

    def _compressed(self, start: int) -> Iterator[RawRow]:
        with open_bytes(self.path) as stream:
            blocks = _Blocks(stream)
            with tarfile.open(
                fileobj=cast(IO[bytes], blocks), mode="r|", bufsize=tarfile.BLOCKSIZE
            ) as tar:
                groups = groupby(_files_of_stream(tar), key=lambda file: file[0])
                for number, (key, files) in enumerate(groups):
                    if number < start:
                        continue  # groupby passes over its files
                    members = [
                        Member(info.name, ending, _content(tar, info)) for _, ending, info in files
                    ]
                    yield RawRow(number, number + 1, (key, members))
                self._check_end(blocks.last)

    def _members(self, pieces: list[Piece]) -> list[Member]:
        members = []
        try:
            with self.path.open("rb") as stream:
                for piece in pieces:
                    stream.seek(piece.start)
                    content = stream.read(piece.num_bytes)
                    if len(content) < piece.num_bytes:
                        raise self._broken("unexpected end of data")
                    members.append(Member(piece.name, piece.ending, content))
        except OSError as error:
            raise unreadable(self.path, error) from error
        return members

    def _check_end(self, last: bytes) -> None:
        """tarfile takes whatever is no header for the end: that must be zeros, or nothing."""
        if any(last):
            raise self._broken("a block is not a header")

    def _broken(self, reason: str) -> VlmtuneError:
        return VlmtuneError(
            f"the file cannot be read as a tar file ({reason})",
            file=self.path,
            do="fetch or write the file again; it may be cut off",
        )


class _Blocks:
    """A stream that tarfile reads block by block, and the last block that it read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""

    def read(self, size: int) -> bytes:
        self.last = self._stream.read(size)
        return self.last


def _files_of_stream(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The files that belong to samples, with key and ending."""
    for member in members_of(tar):
        named = split_name(member.name)
        if member.isreg() and named is not None and is_read(named[1]):
            yield *named, member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    held = tar.extractfile(member)
    assert held is not None, "a regular file"
    return held.read()
