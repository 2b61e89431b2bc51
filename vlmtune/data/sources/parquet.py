"""Parquet: rows by number.

small row groups  -> the last one read is in memory
large row groups  -> a copy in Arrow's form in the cache, mapped: any row costs itself alone
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from vlmtune.data.index import Stamp, check_unchanged, stamp_of
from vlmtune.data.sources.arrow import (
    ARROW_ERRORS,
    ArrowRows,
    check_columns,
    open_arrow,
    row_at,
)
from vlmtune.data.sources.rows import Rows
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError

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
            raise _broken(self.path, error) from error
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
        raise _broken(path, error) from error
    check_columns(names, path)
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest >= LARGE_GROUP_BYTES:
        copied = _open_copy(path, stamp, cache_dir)
        if copied is not None:
            return copied
        logger.warning(
            "%s: its row groups are of up to %d MB, and each row that is in another than the "
            "last costs reading one; data.streaming: true reads each once",
            path,
            largest >> 20,
        )
    return ParquetRows(path, stamp, list(accumulate(group.num_rows for group in groups)))


def _open_copy(path: Path, stamp: Stamp, cache_dir: Path) -> ArrowRows | None:
    """The rows of the file's copy, or None where none can be kept."""
    name = hashlib.sha256(stamp.path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    copy = cache_dir / "arrow" / f"{name}.arrow"
    key = json.dumps(stamp).encode()
    if not _is_copy(copy, key):
        try:
            _write_copy(path, copy, key)
        except OSError as error:
            logger.warning(
                "%s: no copy can be kept in %s (%s)", path, copy.parent, error.strerror or error
            )
            return None
        check_unchanged(path, stamp)
        logger.info(
            "%s: copied for reading by row: %s, %d MB", path, copy, copy.stat().st_size >> 20
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

    copy.parent.mkdir(parents=True, exist_ok=True)
    beside = copy.with_name(f"{copy.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with beside.open("wb") as stream, pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            schema = schema.with_metadata({**(schema.metadata or {}), _KEY: key})
            with pa.ipc.new_file(stream, schema) as writer:
                batches = file.iter_batches(_COPIED_ROWS, use_threads=False)
                while (batch := _next(batches, path)) is not None:
                    writer.write_batch(pa.record_batch(batch.columns, schema=schema))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, copy)
    finally:
        beside.unlink(missing_ok=True)


def _next(batches: Any, path: Path) -> Any:
    try:
        return next(batches, None)
    except ARROW_ERRORS as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> VlmtuneError:
    reason = str(error).split("\n")[0].rstrip(".")
    return VlmtuneError(f"the file cannot be read as parquet ({reason})", file=path)
