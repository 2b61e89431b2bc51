"""The samples of some entries by number: read, parsed and checked when they are asked for.

    entries -> sources of rows -> format told from the first rows -> scan of every row, up to a size
      -> ConversationSet: number -> row -> Conversation

A row that the scan finds bad is not part of the set. A larger set is not scanned: its bad rows are
part of it, and raise when their turn comes.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal, overload

from vlmtune.data.formats.registry import (
    check_entry,
    detect_format,
    format_line,
    parse_row,
)
from vlmtune.data.formats.rows import Row
from vlmtune.data.order import Order, num_slots
from vlmtune.data.sources.registry import open_rows
from vlmtune.data.sources.rows import Rows
from vlmtune.data.types import LOCAL, Access, Conversation
from vlmtune.errors import VlmtuneError, plural
from vlmtune.recipe.data_section import DataEntry, FormatName

logger = logging.getLogger("vlmtune")

SCANNED_OUTRIGHT = 100_000
"""Sets of up to so many rows are parsed as a whole before anything else is done."""

OnBadSample = Literal["error", "skip"]


@dataclass(frozen=True)
class OpenFile:
    """A file of an entry, and how its rows become conversations. `label`: what the ids of rows
    without one start with."""

    entry: DataEntry
    rows: Rows
    format: FormatName
    label: str
    access: Access

    def conversation(self, index: int) -> Conversation:
        """Row `index` (0-based). Raises SampleError with its place where it cannot be used."""
        return parse_row(self.row(index), self.format)

    def row(self, index: int) -> Row:
        source = self.rows.place(index)
        base_dir = self.rows.base_dir if self.entry.image_dir is None else self.entry.image_dir
        return Row(
            values=dict(self.rows.read(index)),
            source=source,
            base_dir=Path(base_dir),
            fallback_id=f"{self.label}:{source.line}",
            entry=self.entry,
            access=self.access,
        )


@dataclass(frozen=True)
class ConversationSet(Sequence[Conversation]):
    """Rows of `files`, numbered through; `kept` are, per file, the rows that are part of it, or
    None for all. Holds no conversation."""

    files: tuple[OpenFile, ...]
    kept: tuple[Sequence[int] | None, ...]
    _ends: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [self._count(at) for at in range(len(self.files))]
        object.__setattr__(self, "_ends", list(accumulate(counts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        file, row = self.locate(index)
        return file.conversation(row)

    def locate(self, index: int) -> tuple[OpenFile, int]:
        """The file and the row in it (0-based) of sample `index`. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = bisect_right(self._ends, index)
        row = index - (self._ends[at - 1] if at else 0)
        kept = self.kept[at]
        return self.files[at], row if kept is None else int(kept[row])

    def counts_and_weights(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Samples and weight of each entry that has any, for `order.Order`."""
        used = self._entries()
        return tuple(count for _, count in used), tuple(entry.weight for entry, _ in used)

    def order(self, *, seed: int) -> Order:
        """The order of the training stream. Raises VlmtuneError where there is no sample, or where
        an entry's weight leaves none of its samples in an epoch."""
        if not len(self):
            num_rows = sum(len(file.rows) for file in self.files)
            raise VlmtuneError(
                "data.train: no sample is left to train on",
                got=f"{plural(num_rows, 'row')}, none of which can be used",
            )
        for entry, count in self._entries():
            if num_slots(count, entry.weight) == 0:
                raise VlmtuneError(
                    "data.train: the weight leaves no sample in an epoch",
                    got=f"{entry.path}: {plural(count, 'sample')} of weight {entry.weight:g}",
                    do="raise the weight, or take the entry out",
                )
        return Order(seed, *self.counts_and_weights())

    def _entries(self) -> list[tuple[DataEntry, int]]:
        """The entries that have samples, and how many each has."""
        counts: dict[int, int] = {}
        entries: dict[int, DataEntry] = {}
        for at, file in enumerate(self.files):
            counts[id(file.entry)] = counts.get(id(file.entry), 0) + self._count(at)
            entries[id(file.entry)] = file.entry
        return [(entries[key], count) for key, count in counts.items() if count]

    def _count(self, at: int) -> int:
        kept = self.kept[at]
        return len(self.files[at].rows) if kept is None else len(kept)


def open_files(
    entries: Sequence[DataEntry], *, access: Access = LOCAL, cache_dir: Path
) -> list[OpenFile]:
    """Every file of `entries`, with its format. Raises VlmtuneError for one that is missing,
    empty, listed twice or in no known format."""
    opened = [(entry, rows) for entry in entries for rows in open_rows(entry, cache_dir=cache_dir)]
    _check_listed_once([rows for _, rows in opened])
    stems = [Path(rows.file).stem for _, rows in opened]
    files = []
    for (entry, rows), stem in zip(opened, stems):
        if len(rows) == 0:
            raise VlmtuneError("there is no sample in the file", file=rows.file)
        label = stem if stems.count(stem) == 1 else rows.file
        name = entry.format or detect_format(rows, entry)
        check_entry(entry, name, file=rows.file)
        line = format_line(rows, entry, name)
        logger.info("%s: %s, format %s", rows.file, plural(len(rows), "row"), line)
        files.append(OpenFile(entry, rows, name, label, access))
    return files


def iterate(files: Sequence[OpenFile]) -> Iterator[tuple[OpenFile, int]]:
    """Every row of `files` as (file, index)."""
    for file in files:
        for index in range(len(file.rows)):
            yield file, index


def _check_listed_once(all_rows: Sequence[Rows]) -> None:
    seen = set()
    for rows in all_rows:
        place = Path(rows.file).resolve()
        if place in seen:
            raise VlmtuneError("the data file is listed twice", file=rows.file, expected="once")
        seen.add(place)
