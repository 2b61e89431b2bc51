"""Arrow, Feather and parquet files: rows by number, or from front to back.

small row groups  -> the last one read is in memory
large row groups  -> a copy in Arrow's form in the cache, mapped: any row costs itself alone
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.sources.base import (
    RawRow,
    Rows,
    Stamp,
    check_unchanged,
    in_pieces,
    open_table,
    stamp_of,
)
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.files import Extra, Numbers, digest, whole_file

FILE_MAGIC = b"ARROW1"
STREAM_MAGIC = b"\xff\xff\xff\xff"

Batch = Callable[[int], Any]
"""Gives the pyarrow record batch of a number."""

Original = tuple[Path, Stamp] | None

ARROW_ERRORS = (OSError, ValueError, NotImplementedError, MemoryError)
"""What pyarrow raises for a file that is damaged, or holds what it cannot read: its own errors are
kinds of these, and a damaged length is a request for memory."""


class ArrowRows:
    """The rows of a file whose record batches end at the row numbers `ends`.

    `copy_of`: the file that it is a copy of, which messages name.
    """

    def __init__(self, path: Path, stamp: Stamp, ends: list[int], copy_of: Original = None) -> None:
        self.path = path if copy_of is None else copy_of[0]
        self._mapped = path
        self._stamp = stamp
        self._ends = ends
        self._copy_of = copy_of
        self._batches: Batch | None = None
        self._last: tuple[int, Any] | None = None  # the last batch, which may be a compressed one

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrowRows, (self._mapped, self._stamp, self._ends, self._copy_of)

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def read(self, index: int) -> Mapping[str, Any]:
        # Looked at each time: a mapped file that is cut short takes the process with it.
        check_unchanged(self._mapped, self._stamp)
        if self._copy_of is not None:
            check_unchanged(*self._copy_of)
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        if self._last is None or self._last[0] != number:
            if self._batches is None:
                self._batches, _, _ = _open(self._mapped)
            self._last = number, _batch(self._batches, number, self._mapped)
        return row_at(self._last[1], index - start, self.place(index))


def open_arrow(path: Path, *, cache_dir: Path, copy_of: Original = None) -> ArrowRows:
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
    return ArrowRows(path, stamp, ends, copy_of)


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


def _open(path: Path) -> tuple[Batch, int, list[str]]:
    """The batches of a mapped file, how many, and the names of the columns."""
    import pyarrow as pa

    try:
        mapped = pa.memory_map(str(path))
        if mapped.read(len(FILE_MAGIC)) == FILE_MAGIC:
            reader = pa.ipc.open_file(mapped)
            return reader.get_batch, reader.num_record_batches, reader.schema.names
        mapped.seek(0)
        stream = pa.ipc.open_stream(mapped)
        held = list(stream)  # of a mapped stream that is not compressed: no copies
        return held.__getitem__, len(held), stream.schema.names
    except ARROW_ERRORS as error:
        raise _broken_arrow(path, error) from error


def _check(batches: Batch, number: int, path: Path) -> int:
    """The rows of a batch whose offsets stay inside it: others would take the process with them."""
    batch = _batch(batches, number, path)
    try:
        batch.validate(full=True)
    except ValueError as error:
        raise _broken_arrow(path, error) from error
    return int(batch.num_rows)


def _batch(batches: Batch, number: int, path: Path) -> Any:
    try:
        return batches(number)
    except ARROW_ERRORS as error:
        raise _broken_arrow(path, error) from error


def _broken_arrow(path: Path, error: Exception) -> VlmtuneError:
    reason = str(error).split("\n")[0].rstrip(".")
    return VlmtuneError(f"the file cannot be read as Arrow ({reason})", file=path)


logger = logging.getLogger("vlmtune")

LARGE_GROUP_BYTES = 16 << 20
"""Row groups from this size on are not read anew for every row that is asked for."""

_COPIED_ROWS = 64
_KEY = b"vlmtune copy of"


class ParquetRows:
    """The rows of a file whose row groups end at the row numbers `ends`."""

    def __init__(self, path: Path, stamp: Stamp, ends: list[int]) -> None:
        self.path = path
        self._stamp = stamp
        self._ends = ends
        self._group: tuple[int, Any] | None = None  # the last one read: its number, a pyarrow table

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetRows, (self.path, self._stamp, self._ends)

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def read(self, index: int) -> Mapping[str, Any]:
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        return row_at(self._read_group(number), index - start, self.place(index))

    def _read_group(self, number: int) -> Any:
        import pyarrow.parquet

        if self._group is not None and self._group[0] == number:
            return self._group[1]
        check_unchanged(self.path, self._stamp)
        self._group = None  # let go of before the next is read
        try:
            with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False) as file:
                # Workers are forked: no threads of another library in them.
                table = file.read_row_group(number, use_threads=False)
        except ARROW_ERRORS as error:
            raise _broken_parquet(self.path, error) from error
        self._group = number, table
        return table


def open_parquet(path: Path, *, cache_dir: Path) -> Rows:
    """Raises VlmtuneError where the file is no parquet file or cannot be read.

    Of a file with large row groups a copy is made in the cache, which is said. Where that cannot be
    written, its rows are read slowly, which is said too.
    """
    import pyarrow.parquet

    stamp = stamp_of(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
            names = file.schema_arrow.names
    except ARROW_ERRORS as error:
        raise _broken_parquet(path, error) from error
    check_columns(names, path)
    largest = max((group.total_byte_size for group in groups), default=0)
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
    return ParquetRows(path, stamp, list(accumulate(group.num_rows for group in groups)))


def _open_copy(path: Path, stamp: Stamp, cache_dir: Path) -> ArrowRows | None:
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
            while (batch := _next(batches, path)) is not None:
                writer.write_batch(pa.record_batch(batch.columns, schema=schema))


def _next(batches: Any, path: Path) -> Any:
    try:
        return next(batches, None)
    except ARROW_ERRORS as error:
        raise _broken_parquet(path, error) from error


def _broken_parquet(path: Path, error: Exception) -> VlmtuneError:
    reason = str(error).split("\n")[0].rstrip(".")
    return VlmtuneError(f"the file cannot be read as parquet ({reason})", file=path)


BATCH_ROWS = 64
"""Rows decoded at a time; pictures among them stay as they are stored."""


@dataclass(frozen=True)
class ParquetShard:
    """The rows of a file; a raw row is a piece of an Arrow batch."""

    path: Path

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def rows(self, start: int) -> Iterator[RawRow]:
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False) as file:
                check_columns(file.schema_arrow.names, self.path)
                yield from _rows(file, start)
        except ARROW_ERRORS as error:
            reason = str(error).split("\n")[0].rstrip(".")
            raise VlmtuneError(
                f"the file cannot be read as parquet ({reason})", file=self.path
            ) from error

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        batch, at = row.content
        return row_at(batch, at, Source(self.file, row.line))


def _rows(file: Any, start: int) -> Iterator[RawRow]:
    number = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if number + count <= start:
            number += count
            continue
        # Workers are forked: no threads of another library in them.
        batches = file.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False)
        for batch in batches:
            for at in range(batch.num_rows):
                if number >= start:
                    yield RawRow(number, number + 1, (batch, at))
                number += 1
