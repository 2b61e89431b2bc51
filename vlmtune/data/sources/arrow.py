"""Arrow, Feather and parquet files: rows by number, or from front to back.

small row groups  -> the last one read is in memory
large row groups  -> a copy in Arrow's form in the cache, mapped: any row costs itself alone
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlmtune.data.sources.base import (
    RawRow,
    Stamp,
    check_unchanged,
    in_pieces,
    iter_by_number,
    open_table,
    stamp_of,
)
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.files import Extra, Numbers, digest, whole_file

FILE_MAGIC = b"ARROW1"
STREAM_MAGIC = b"\xff\xff\xff\xff"

Original = tuple[Path, Stamp] | None

ARROW_ERRORS = (OSError, ValueError, NotImplementedError, MemoryError)
"""What pyarrow raises for a file that is damaged, or holds what it cannot read: its own errors are
kinds of these, and a damaged length is a request for memory."""


@dataclass(frozen=True)
class BatchRows:
    """Rows that are read in batches: those of an Arrow file, or a parquet file's row groups.

    `ends`: the row number at which each batch ends; None: opened for streaming. `batches(number)`
    gives a batch. `scan(start)` reads from front to back without them.
    """

    path: Path
    ends: list[int] | None
    batches: Callable[[int], Any]
    scan: Callable[[int], Iterator[RawRow]] | None = None

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        assert self.ends is not None, "opened for streaming"
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        assert self.ends is not None, "opened for streaming"
        number = bisect_right(self.ends, index)
        start = self.ends[number - 1] if number else 0
        return row_at(self.batches(number), index - start, self.place(index))

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def iter_from(self, start: int) -> Iterator[RawRow]:
        return iter_by_number(self, start) if self.scan is None else self.scan(start)


class ArrowBatches:
    """The record batches of a mapped file, which is opened anew in each process; the last one read
    is kept, as it may be a compressed one. `copy_of`: the file that it is a copy of."""

    def __init__(self, path: Path, stamp: Stamp, copy_of: Original) -> None:
        self._path, self._stamp, self._copy_of = path, stamp, copy_of
        self._read: Callable[[int], Any] | None = None
        self._last: tuple[int, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowBatches, (self._path, self._stamp, self._copy_of)

    def __call__(self, number: int) -> Any:
        # Looked at each time: a mapped file that is cut short takes the process with it.
        check_unchanged(self._path, self._stamp)
        if self._copy_of is not None:
            check_unchanged(*self._copy_of)
        if self._last is None or self._last[0] != number:
            if self._read is None:
                self._read, _, _ = _open(self._path)
            with _translated(self._path, "Arrow"):
                self._last = number, self._read(number)
        return self._last[1]


def open_arrow(path: Path, *, cache_dir: Path, copy_of: Original = None) -> BatchRows:
    """An Arrow file, or the stream of batches that `datasets` writes; or such a copy of a file.

    Raises VlmtuneError where it is neither, cannot be read or is damaged. That is looked at once
    and kept: it takes reading all texts, but no bytes columns.
    """
    stamp = stamp_of(path)
    batches, num_batches, names = _open(path)
    check_columns(names, path)

    def build(extra: Extra) -> Iterator[Numbers]:
        return in_pieces(([_check(batches, n, path)] for n in range(num_batches)), columns=1)

    table = open_table("arrow", [(path, stamp)], columns=1, build=build, cache_dir=cache_dir)
    ends = np.cumsum(table.values[:, 0]).tolist()
    named = path if copy_of is None else copy_of[0]
    return BatchRows(named, ends, ArrowBatches(path, stamp, copy_of))


def row_at(table: Any, index: int, source: Source) -> Mapping[str, Any]:
    """Row `index` of a pyarrow table or batch. Raises SampleError where Python cannot hold it."""
    try:
        row: Mapping[str, Any] = table.slice(index, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:
        raise SampleError(
            f"the row's values cannot be read ({error})",
            at=source,
        ) from error
    return row


def check_columns(names: list[str], path: Path) -> None:
    """Raises VlmtuneError where two columns have one name."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise VlmtuneError("two columns have the same name", file=path, got=", ".join(twice))


def _open(path: Path) -> tuple[Callable[[int], Any], int, list[str]]:
    """The batches of a mapped file, how many, and the names of the columns."""
    import pyarrow as pa

    with _translated(path, "Arrow"):
        mapped = pa.memory_map(str(path))
        if mapped.read(len(FILE_MAGIC)) == FILE_MAGIC:
            reader = pa.ipc.open_file(mapped)
            return reader.get_batch, reader.num_record_batches, reader.schema.names
        mapped.seek(0)
        stream = pa.ipc.open_stream(mapped)
        held = list(stream)  # of a mapped stream that is not compressed: no copies
        return held.__getitem__, len(held), stream.schema.names


def _check(batches: Callable[[int], Any], number: int, path: Path) -> int:
    """The rows of a batch whose offsets stay inside it: others would take the process with them."""
    with _translated(path, "Arrow"):
        batch = batches(number)
        batch.validate(full=True)
        return int(batch.num_rows)


@contextmanager
def _translated(path: Path, kind: Literal["Arrow", "parquet"]) -> Iterator[None]:
    """What pyarrow raises for a file that is damaged, as a VlmtuneError."""
    try:
        yield
    except ARROW_ERRORS as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise VlmtuneError(f"the file cannot be read as {kind} ({reason})", file=path) from error


logger = logging.getLogger("vlmtune")

LARGE_GROUP_BYTES = 16 << 20
"""Row groups from this size on are not read anew for every row that is asked for."""

_COPIED_ROWS = 64
_KEY = b"vlmtune copy of"


class RowGroups:
    """The row groups of a parquet file as pyarrow tables; the last one read is kept."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self._path, self._stamp = path, stamp
        self._last: tuple[int, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self._path, self._stamp)

    def __call__(self, number: int) -> Any:
        import pyarrow.parquet

        if self._last is not None and self._last[0] == number:
            return self._last[1]
        check_unchanged(self._path, self._stamp)
        self._last = None  # let go of before the next is read
        with (
            _translated(self._path, "parquet"),
            pyarrow.parquet.ParquetFile(self._path, pre_buffer=False) as file,
        ):
            # Workers are forked: no threads of another library in them.
            self._last = number, file.read_row_group(number, use_threads=False)
        return self._last[1]


def open_parquet(path: Path, *, cache_dir: Path, streaming: bool = False) -> BatchRows:
    """Raises VlmtuneError where the file is no parquet file or cannot be read: of a stream, when
    its first row is read.

    By number, a copy of a file with large row groups is made in the cache, which is said. Where
    that cannot be written, its rows are read slowly, which is said too.
    """
    import pyarrow.parquet

    stamp = stamp_of(path)
    groups, scan = RowGroups(path, stamp), partial(_parquet_from, path)
    if streaming:
        return BatchRows(path, None, groups, scan)
    with _translated(path, "parquet"), pyarrow.parquet.ParquetFile(path) as file:
        found = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
        names = file.schema_arrow.names
    check_columns(names, path)
    largest = max((group.total_byte_size for group in found), default=0)
    if largest >= LARGE_GROUP_BYTES:
        copied = _open_copy(path, stamp, cache_dir)
        if copied is not None:
            return copied
        logger.warning(
            "%s: its row groups have up to %d MB, and reading a row from a new row group reads all "
            "of it; data.streaming: true reads each row group once",
            path,
            largest >> 20,
        )
    return BatchRows(path, list(accumulate(group.num_rows for group in found)), groups, scan)


def _open_copy(path: Path, stamp: Stamp, cache_dir: Path) -> BatchRows | None:
    """The rows of the file's copy, or None where none can be kept."""
    copy = cache_dir / "arrow" / f"{digest(stamp.path)[:32]}.arrow"
    key = json.dumps(stamp).encode()
    if not _is_copy(copy, key):
        try:
            _write_copy(path, copy, key)
        except OSError as error:
            logger.warning(
                "%s: a copy cannot be written to %s (%s)",
                path,
                copy.parent,
                error.strerror or error,
            )
            return None
        check_unchanged(path, stamp)
        logger.info(
            "%s: copied to %s for reading by row, %d MB", path, copy, copy.stat().st_size >> 20
        )
    return open_arrow(copy, cache_dir=cache_dir, copy_of=(path, stamp))


def _is_copy(copy: Path, key: bytes) -> bool:
    import pyarrow as pa

    try:
        with pa.memory_map(str(copy)) as mapped:
            metadata = pa.ipc.open_file(mapped).schema.metadata
    except (OSError, ValueError):
        return False
    return metadata is not None and metadata.get(_KEY) == key


def _write_copy(path: Path, copy: Path, key: bytes) -> None:
    """Raises OSError where the copy cannot be written, VlmtuneError where the file is broken."""
    import pyarrow as pa
    import pyarrow.parquet

    with whole_file(copy) as stream, pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        schema = schema.with_metadata({**(schema.metadata or {}), _KEY: key})
        with pa.ipc.new_file(stream, schema) as writer:
            batches = file.iter_batches(_COPIED_ROWS, use_threads=False)
            while True:
                with _translated(path, "parquet"):
                    batch = next(batches, None)
                if batch is None:
                    break
                writer.write_batch(pa.record_batch(batch.columns, schema=schema))


STREAMED_ROWS = 64
"""Rows decoded at a time; pictures among them stay as they are stored."""


def _parquet_from(path: Path, start: int) -> Iterator[RawRow]:
    """The rows of a file; row groups that are passed over are not read."""
    import pyarrow.parquet

    number = 0
    with _translated(path, "parquet"), pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        check_columns(file.schema_arrow.names, path)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if number + count <= start:
                number += count
                continue
            # Workers are forked: no threads of another library in them.
            batches = file.iter_batches(STREAMED_ROWS, row_groups=[group], use_threads=False)
            for batch in batches:
                for at in range(batch.num_rows):
                    if number >= start:
                        source = Source(str(path), number + 1)
                        yield RawRow(number, number + 1, partial(row_at, batch, at, source))
                    number += 1
