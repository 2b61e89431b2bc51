"""The training stream of rows that are read from front to back: mixed, shuffled, resumable.

    epoch -> order of its shards -> their rows one after the other -> blocks of `block_rows`
      -> each block in an order of its own

Every order is a pure function of (seed, entry, epoch, block), so a cursor of five numbers says
where the entry stands. Held at a time: one block of rows that are not parsed.

    entries -> shards (sources/) -> each entry's rows for ever, in shuffled blocks
      -> one entry chosen for each place of the stream, by weight -> StreamRow -> Conversation

A row is parsed only when its conversation is needed: a process or worker that skips rows pays only
for reading them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from vlmtune.data.dataset import OpenFile, labels_of
from vlmtune.data.formats.registry import (
    find_format,
    first_rows,
    parse_row,
    readable,
    unused_keys,
)
from vlmtune.data.order import chosen_entry, permuted
from vlmtune.data.sources.base import RawRow, Rows
from vlmtune.data.sources.registry import open_rows
from vlmtune.data.types import LOCAL, Conversation, MediaPolicy, Source
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.data_section import DataEntry, FormatName
from vlmtune.recipe.paths import HUB, expand_shards


@dataclass(frozen=True)
class StreamPosition:
    """The block an entry is in, and how much of it was taken. The block starts at `row` of the
    shard that is number `shard` in the epoch's order. All 0-based."""

    epoch: int = 0
    block: int = 0
    shard: int = 0
    row: int = 0
    taken: int = 0


class ShardRow(NamedTuple):
    """A row and its shard, as a number in the entry's list; `turn` is the shard's number in the
    epoch's order."""

    turn: int
    shard: int
    row: RawRow


class ShuffledReader:
    """Takes rows of `shards`, entry number `entry` of the data, from `cursor` on.

    A file is opened when its first row is due, and again at the start of each epoch.
    """

    def __init__(
        self,
        shards: Sequence[Rows],
        *,
        seed: int,
        entry: int,
        block_rows: int,
        cursor: StreamPosition | None = None,
    ) -> None:
        self._shards = shards
        self._key = f"vlmtune:{seed}:stream {entry}"
        self._block_rows = block_rows
        self.cursor = cursor or StreamPosition()
        self._rows: Iterator[ShardRow] | None = None
        self._block: list[ShardRow] = []
        self._order: list[int] = []

    def take(self) -> ShardRow:
        """The next row. Raises VlmtuneError where a file cannot be read on, where there is no row
        at all, or fewer than when `cursor` was made."""
        if self._rows is None:
            self._resume()
        while self.cursor.taken == len(self._block):
            self._next_block()
        at = self.cursor
        self.cursor = StreamPosition(at.epoch, at.block, at.shard, at.row, at.taken + 1)
        return self._block[self._order[at.taken]]

    def _resume(self) -> None:
        at = self.cursor
        self._rows = self._walk(at.epoch, turn=at.shard, row=at.row)
        self._begin(self._read(), at)
        if at.taken > len(self._block):
            raise VlmtuneError(
                "the data has fewer rows than when the run stopped",
                file=self._shards[0].file,
                do="restore it, or start over with --resume never",
            )

    def _next_block(self) -> None:
        at = self.cursor
        if not self._block and at.block == 0:
            raise VlmtuneError("there is no sample in the data", file=self._shards[0].file)
        block = self._read()
        if block:
            first = block[0]
            self._begin(block, StreamPosition(at.epoch, at.block + 1, first.turn, first.row.number))
        else:
            self._rows = self._walk(at.epoch + 1, turn=0, row=0)
            self._begin(self._read(), StreamPosition(at.epoch + 1))

    def _read(self) -> list[ShardRow]:
        assert self._rows is not None
        self._block = []  # let go of before the next is read: one block at a time
        return list(islice(self._rows, self._block_rows))

    def _begin(self, block: list[ShardRow], cursor: StreamPosition) -> None:
        self._block, self.cursor = block, cursor
        size = len(block)
        key = f"{self._key}:epoch {cursor.epoch}:block {cursor.block}"
        self._order = [permuted(place, size=size, key=key) for place in range(size)]

    def _walk(self, epoch: int, *, turn: int, row: int) -> Iterator[ShardRow]:
        """The rows of an epoch from row `row` of its shard number `turn` on."""
        size = len(self._shards)
        for later in range(turn, size):
            shard = permuted(later, size=size, key=f"{self._key}:epoch {epoch}:shards")
            for raw in self._shards[shard].iter_from(row if later == turn else 0):
                yield ShardRow(later, shard, raw)


logger = logging.getLogger("vlmtune")


@dataclass(frozen=True)
class StreamRow:
    """A row of the stream, not yet parsed."""

    file: OpenFile
    raw: RawRow

    @property
    def id(self) -> str:
        """Its name where the row itself gives none."""
        return self.file.fallback_id(self.source)

    @property
    def source(self) -> Source:
        return Source(self.file.rows.file, self.raw.line)

    def conversation(self) -> Conversation:
        """Raises SampleError with the place where the row cannot be used."""
        row = self.file.as_row(self.raw.read(), self.source)
        return parse_row(row, self.file.format)


@dataclass(frozen=True)
class StreamCursor:
    """Where a stream stands: the next place, and where each entry is."""

    place: int
    entries: tuple[StreamPosition, ...]

    def as_dict(self) -> dict[str, Any]:
        """For the checkpoint: JSON values."""
        return asdict(self) | {"entries": [asdict(entry) for entry in self.entries]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamCursor:
        return cls(values["place"], tuple(StreamPosition(**entry) for entry in values["entries"]))


@dataclass(frozen=True)
class Stream:
    """What is streamed, with no file open; pickles. `entries` are the shards of each entry,
    `block_rows` how many rows are shuffled at a time."""

    entries: tuple[tuple[OpenFile, ...], ...]
    seed: int
    block_rows: int

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(files[0].entry.weight for files in self.entries)

    def start(self) -> StreamCursor:
        return StreamCursor(0, (StreamPosition(),) * len(self.entries))

    def every_row(self, limit: int | None = None) -> Iterator[StreamRow]:
        """Each row once, in the order of the files; or the first `limit`."""
        return islice(self._every_row(), limit)

    def _every_row(self) -> Iterator[StreamRow]:
        for files in self.entries:
            for file in files:
                for raw in file.rows.iter_from(0):
                    yield StreamRow(file, raw)


class OpenStream:
    """The rows of `stream` from `cursor` on, without end."""

    def __init__(self, stream: Stream, cursor: StreamCursor | None = None) -> None:
        cursor = cursor or stream.start()
        assert len(cursor.entries) == len(stream.entries)
        self._stream = stream
        self._place = cursor.place
        self._readers = [
            ShuffledReader(
                [file.rows for file in files],
                seed=stream.seed,
                entry=number,
                block_rows=stream.block_rows,
                cursor=at,
            )
            for number, (files, at) in enumerate(zip(stream.entries, cursor.entries, strict=True))
        ]

    @property
    def cursor(self) -> StreamCursor:
        """Where the next row is."""
        return StreamCursor(self._place, tuple(reader.cursor for reader in self._readers))

    def take(self) -> StreamRow:
        """The next row. Raises VlmtuneError where a file cannot be read on."""
        stream = self._stream
        entry = chosen_entry(self._place, seed=stream.seed, weights=stream.weights)
        placed = self._readers[entry].take()
        self._place += 1
        return StreamRow(stream.entries[entry][placed.shard], placed.row)


def open_stream(
    entries: Sequence[DataEntry],
    *,
    seed: int,
    block_rows: int,
    media_policy: MediaPolicy = LOCAL,
    cache_dir: Path,
) -> Stream:
    """The stream of `entries`; of each, the first shard with rows tells the format.

    Raises VlmtuneError for a file that is missing, empty, listed twice or cannot be streamed.
    """
    opened = [(e, open_rows(e, cache_dir=cache_dir, streaming=True)) for e in entries]
    labels = iter(labels_of([rows for _, shards in opened for rows in shards]))
    streamed = []
    for entry, shards in opened:
        name = _format_of(entry, shards)
        files = (OpenFile(entry, rows, name, next(labels), media_policy) for rows in shards)
        streamed.append(tuple(files))
    return Stream(tuple(streamed), seed, block_rows)


def stream_identity(entries: Sequence[DataEntry]) -> dict[str, str]:
    """What tells each entry's files from changed ones without reading them: size and time of
    modification; of a hub data set, its revision."""
    found = {}
    for entry in entries:
        if entry.path.startswith(HUB):
            found[entry.path] = f"revision {entry.revision or 'main'}"
            continue
        for file in _files_of(entry):
            about = os.stat(file)
            found[file] = f"{about.st_size} bytes, modified {about.st_mtime_ns}"
    return found


def _files_of(entry: DataEntry) -> list[str]:
    """The files that `entry` names, and those below its folders."""
    files: list[str] = [] if entry.annotations is None else [entry.annotations]
    for path in expand_shards(entry.path):
        if os.path.isdir(path):
            below = sorted(found for found in Path(path).rglob("*") if found.is_file())
            files += [str(found) for found in below]
        elif os.path.exists(path):
            files.append(path)
    return files


def _format_of(entry: DataEntry, shards: Sequence[Rows]) -> FormatName:
    """The format of an entry, which is logged, with the keys that it does not read."""
    for shard in shards:
        if first := first_rows(shard):
            break
    else:
        raise VlmtuneError("there is no sample in the data", file=entry.path)
    name, line = find_format(first, entry, file=shard.file)
    logger.info("%s: %d shard(s), streamed, format %s", entry.path, len(shards), line)
    unused = {key for values in readable(first) for key in unused_keys(values, entry, name)}
    if unused:
        names = ", ".join(sorted(map(str, unused)))
        logger.info("%s: unused keys in the first rows: %s", entry.path, names)
    return name
