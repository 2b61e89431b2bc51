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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from vlmtune.data.dataset import check_listed_once
from vlmtune.data.formats.base import Row
from vlmtune.data.formats.registry import (
    NUM_LOOKED_AT,
    check_entry,
    detect_format,
    format_line,
    parse_row,
    unused_keys,
)
from vlmtune.data.order import chosen_entry, permuted
from vlmtune.data.sources.base import RawRow, Shard
from vlmtune.data.sources.registry import open_shards
from vlmtune.data.types import LOCAL, Conversation, MediaPolicy, Source
from vlmtune.errors import SampleError, VlmtuneError
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
        shards: Sequence[Shard],
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
            for raw in self._shards[shard].rows(row if later == turn else 0):
                yield ShardRow(later, shard, raw)


logger = logging.getLogger("vlmtune")


@dataclass(frozen=True)
class StreamFile:
    """A shard of an entry, and how its rows become conversations. `label`: what the ids of rows
    without one start with."""

    entry: DataEntry
    shard: Shard
    format: FormatName
    label: str
    media_policy: MediaPolicy


@dataclass(frozen=True)
class StreamRow:
    """A row of the stream, not yet parsed."""

    file: StreamFile
    raw: RawRow

    @property
    def id(self) -> str:
        """Its name where the row itself gives none."""
        return f"{self.file.label}:{self.raw.line}"

    @property
    def source(self) -> Source:
        return Source(self.file.shard.file, self.raw.line)

    def conversation(self) -> Conversation:
        """Raises SampleError with the place where the row cannot be used."""
        file = self.file
        own = file.entry.image_dir
        row = Row(
            values=dict(file.shard.parse(self.raw)),
            source=self.source,
            base_dir=file.shard.base_dir if own is None else Path(own),
            fallback_id=self.id,
            entry=file.entry,
            media_policy=file.media_policy,
        )
        return parse_row(row, file.format)


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

    entries: tuple[tuple[StreamFile, ...], ...]
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
                for raw in file.shard.rows(0):
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
                [file.shard for file in files],
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
    opened = [(entry, open_shards(entry, cache_dir=cache_dir)) for entry in entries]
    check_listed_once(shard.file for _, shards in opened for shard in shards)
    stems = Counter(_stem(shard.file) for _, shards in opened for shard in shards)
    streamed = []
    for entry, shards in opened:
        name = _format_of(entry, shards)
        labels = [_stem(s.file) if stems[_stem(s.file)] == 1 else s.file for s in shards]
        streamed.append(
            tuple(
                StreamFile(entry, shard, name, label, media_policy)
                for shard, label in zip(shards, labels, strict=True)
            )
        )
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


@dataclass(frozen=True)
class _Head:
    """The first rows of a shard, by number."""

    shard: Shard
    raws: list[RawRow]

    @property
    def file(self) -> str:
        return self.shard.file

    @property
    def base_dir(self) -> Path:
        return self.shard.base_dir

    def __len__(self) -> int:
        return len(self.raws)

    def place(self, index: int) -> Source:
        return Source(self.file, self.raws[index].line)

    def read(self, index: int) -> Mapping[str, Any]:
        return self.shard.parse(self.raws[index])


def _format_of(entry: DataEntry, shards: Sequence[Shard]) -> FormatName:
    """The format of an entry, which is logged, with the keys that it does not read."""
    for shard in shards:
        head = _Head(shard, list(islice(shard.rows(0), NUM_LOOKED_AT)))
        if head.raws:
            break
    else:
        raise VlmtuneError("there is no sample in the data", file=entry.path)
    name = entry.format or detect_format(head, entry)
    check_entry(entry, name, file=head.file)
    line = format_line(head, entry, name)
    logger.info("%s: %d shard(s), streamed, format %s", entry.path, len(shards), line)
    unused: set[str] = set()
    for index in range(len(head)):
        try:
            unused |= unused_keys(head.read(index), entry, name)
        except SampleError:
            continue
    if unused:
        names = ", ".join(sorted(map(str, unused)))
        logger.info("%s: unused keys in the first rows: %s", entry.path, names)
    return name


def _stem(file: str) -> str:
    return Path(file.removesuffix(".gz")).stem
