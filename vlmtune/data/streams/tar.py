"""WebDataset shards from front to back, plain or compressed (`.tar.gz`, `.tgz`).

A sample of a plain shard is where its files lie, and they are read when it is parsed: a block of
samples holds no pictures. Of a compressed one it is the files themselves. The files of a sample
must be next to each other; where they are not, each part counts as a sample.
"""

from __future__ import annotations

import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from vlmtune.data.index import unreadable
from vlmtune.data.sources.tar_sample import Member, is_read, members_of, row_of, split_name
from vlmtune.data.streams.lines import open_bytes
from vlmtune.data.streams.shards import RawRow
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError

logger = logging.getLogger("vlmtune")

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
                        kinds[f".{named[1]}" if named else "hidden or without an ending"] += 1
        except tarfile.TarError as error:
            raise self._broken(str(error)) from error
        if kinds:
            found = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))
            logger.info(
                "%s: files that are not read, of the first %d: %s", self.path, NUM_LOOKED_AT, found
            )

    def _plain(self, start: int) -> Iterator[RawRow]:
        with open_bytes(self.path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for number, (key, files) in enumerate(groupby(_files(tar), key=lambda file: file[0])):
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
                groups = groupby(_files(tar), key=lambda file: file[0])
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
            raise self._broken("a block in it is no header")

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


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The files that belong to samples, with key and ending."""
    for member in members_of(tar):
        named = split_name(member.name)
        if member.isreg() and named is not None and is_read(named[1]):
            yield *named, member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    held = tar.extractfile(member)
    assert held is not None, "a regular file"
    return held.read()
