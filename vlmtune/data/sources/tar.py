"""WebDataset shards: by number or from front to back; nothing is extracted.

    cat/007.jpg, cat/007.json, cat/007.txt
      -> {"__key__": "cat/007", "image": bytes, …the fields of the json…, "text": …}

`jpg`, `png` and the like: the picture, or with several the list `images`; `mp4` and the like:
`video`; `json`: its fields, or where it is a list, `messages`; `txt`: `text`; `caption`; `cls`:
`label`; `NAME.txt`: the field NAME. Nothing else is read, and nothing is unpickled.

A sample of a plain shard is where its files lie, and they are read when it is parsed: a block of
samples holds no pictures. Of a compressed one it is the files themselves. The files of a sample
must be next to each other; where they are not, the index is refused, and a stream takes each part
for a sample.
"""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from vlmtune.data.sources.base import (
    RawRow,
    SpanRows,
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
from vlmtune.files import Extra, Numbers

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


NUM_LOOKED_AT = 100
"""Files of a streamed shard that are looked at for such as are not read."""

COMPRESSED = (".tar.gz", ".tgz")


def open_tar(path: Path, *, cache_dir: Path, streaming: bool = False) -> SpanRows:
    """The samples of a shard; the headers of its files are part of a sample's span.

    Raises VlmtuneError where the file is no tar file, is cut off, or its samples are not in one
    piece each: of a stream, when it is read so far. What is in it and not read is counted and said.
    """
    stamp = stamp_of(path)
    files = ((path, stamp),)
    if streaming:
        is_compressed = path.name.lower().endswith(COMPRESSED)
        scan = partial(_read_from, path) if is_compressed else partial(_find_from, path, stamp)
        return SpanRows(files, None, _parse, scan)

    def build(extra: Extra) -> Iterable[Numbers]:
        return in_pieces(_scan(path, extra), columns=2)

    table = open_table("tar", files, columns=2, build=build, cache_dir=cache_dir)
    if table.extra["not_read"]:
        logger.info("%s: unused files: %s", path, _listed(table.extra["not_read"]))
    return SpanRows(files, table, _parse, partial(_find_from, path, stamp))


def log_not_read(path: Path) -> None:
    """Log the kinds of files, among the first of a shard, that are part of no sample."""
    not_read: Counter[str] = Counter()
    with (
        _translated(path),
        open_bytes(path) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for _ in _files(tar, islice(tar, NUM_LOOKED_AT), not_read):
            continue
    if not_read:
        logger.info(
            "%s: unused files among the first %d: %s",
            path,
            NUM_LOOKED_AT,
            _listed(not_read),
        )


class _File(NamedTuple):
    """A file of a sample; `end`: where the next header is."""

    key: str
    ending: str
    info: tarfile.TarInfo
    end: int


class _Piece(NamedTuple):
    """Where the content of a sample's file lies in the shard."""

    name: str
    ending: str
    start: int
    num_bytes: int


def _scan(path: Path, extra: Extra) -> Iterator[tuple[int, int]]:
    """Start and end of each sample, for the index."""
    not_read: Counter[str] = Counter()
    seen: set[int] = set()
    for files in _samples(path, not_read, log_no_mark=True):
        key = files[0].key
        if hash(key) in seen:
            raise VlmtuneError(
                "the files of a sample are not next to each other",
                file=path,
                got=key,
                do="create the tar file again with --sort=name",
            )
        seen.add(hash(key))
        yield files[0].info.offset, files[-1].end
    extra["not_read"] = dict(not_read)


def _find_from(path: Path, stamp: Stamp, start: int) -> Iterator[RawRow]:
    """The samples of a plain shard, by where they are."""
    for number, files in enumerate(_samples(path, Counter())):
        if number >= start:
            pieces = [_Piece(f.info.name, f.ending, f.info.offset_data, f.info.size) for f in files]
            read = partial(_read, path, stamp, files[0].key, pieces, number + 1)
            yield RawRow(number, number + 1, read)


def _read_from(path: Path, start: int) -> Iterator[RawRow]:
    """The samples of a compressed shard, with the content of their files."""
    with _translated(path), open_bytes(path) as stream:
        blocks = _Blocks(stream)
        with tarfile.open(
            fileobj=cast(IO[bytes], blocks), mode="r|", bufsize=tarfile.BLOCKSIZE
        ) as tar:
            samples = groupby(_files(tar, members_of(tar), Counter()), key=attrgetter("key"))
            for number, (key, files) in enumerate(samples):
                if number < start:
                    continue  # groupby passes over its files
                members = [Member(f.info.name, f.ending, _content(tar, f.info)) for f in files]
                source = Source(str(path), number + 1)
                yield RawRow(number, number + 1, partial(row_of, key, members, source))
            _check_end(blocks.last, tar.offset, path)


def _samples(
    path: Path, not_read: Counter[str], *, log_no_mark: bool = False
) -> Iterator[list[_File]]:
    """The files of each sample of a plain shard."""
    with (
        _translated(path),
        path.open("rb") as stream,
        tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
        files = _files(tar, members_of(tar), not_read)
        for _, group in groupby(files, key=attrgetter("key")):
            yield list(group)
        stream.seek(tar.offset)
        last = stream.read(tarfile.BLOCKSIZE)
        _check_end(last, tar.offset, path)
    if log_no_mark and not last:
        logger.info("%s: the tar file has no end marker; it may be cut off", path)


def _files(
    tar: tarfile.TarFile, members: Iterable[tarfile.TarInfo], not_read: Counter[str]
) -> Iterator[_File]:
    """The files that belong to samples; the others are counted."""
    for info in members:
        named = split_name(info.name)
        if info.isdir():
            continue
        if not info.isreg():
            not_read["links and the like"] += 1
        elif named is None:
            not_read["hidden or without an extension"] += 1
        elif not is_read(named[1]):
            not_read[f".{named[1]}"] += 1
        else:
            yield _File(*named, info, tar.offset)


def _read(
    path: Path, stamp: Stamp, key: str, pieces: Sequence[_Piece], line: int
) -> Mapping[str, Any]:
    members = [
        Member(name, ending, read_span(path, stamp, start, start + num_bytes))
        for name, ending, start, num_bytes in pieces
    ]
    return row_of(key, members, Source(str(path), line))


def _parse(content: bytes, source: Source) -> Mapping[str, Any]:
    """The row of a sample's span: a piece of a tar file that starts at a header is itself one."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        files = list(_files(tar, members_of(tar), Counter()))
        members = [Member(f.info.name, f.ending, _content(tar, f.info)) for f in files]
    return row_of(files[0].key, members, source)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    held = tar.extractfile(info)
    assert held is not None, "a regular file"
    return held.read()


def _check_end(last: bytes, offset: int, path: Path) -> None:
    """tarfile takes whatever is no header for the end: that must be zeros, or nothing."""
    if any(last):
        raise _broken(path, f"it is broken at byte {offset + 1}: no header there")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """What shows that a tar file is broken, as a VlmtuneError."""
    try:
        yield
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _broken(path, str(error)) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _broken(path: Path, reason: str) -> VlmtuneError:
    return VlmtuneError(
        f"the file cannot be read as a tar file ({reason})",
        file=path,
        do="fetch or write the file again; it may be cut off",
    )


def _listed(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))


class _Blocks:
    """A stream that tarfile reads block by block, and the last block that it read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.last = b""

    def read(self, size: int) -> bytes:
        self.last = self._stream.read(size)
        return self.last
