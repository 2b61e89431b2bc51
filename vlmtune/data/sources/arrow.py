"""Arrow and Feather files: rows by number, mapped from the file rather than read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.index import (
    Extra,
    Numbers,
    Stamp,
    check_unchanged,
    in_pieces,
    open_table,
    stamp_of,
)
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError

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
            f"the row's values cannot be read ({error})", file=source.file, line=source.line
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
        raise _broken(path, error) from error


def _check(batches: Batch, number: int, path: Path) -> int:
    """The rows of a batch whose offsets stay inside it: others would take the process with them."""
    batch = _batch(batches, number, path)
    try:
        batch.validate(full=True)
    except ValueError as error:
        raise _broken(path, error) from error
    return int(batch.num_rows)


def _batch(batches: Batch, number: int, path: Path) -> Any:
    try:
        return batches(number)
    except ARROW_ERRORS as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> VlmtuneError:
    reason = str(error).split("\n")[0].rstrip(".")
    return VlmtuneError(f"the file cannot be read as Arrow ({reason})", file=path)
