"""Parquet: rows by number, a row group in memory at a time."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from vlmtune.data.index import Stamp, check_unchanged, stamp_of
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError

logger = logging.getLogger("vlmtune")

LARGE_GROUP_BYTES = 128 << 20
"""A file with larger row groups is said to be slow by number."""


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
        table = self._read_group(number)
        row: Mapping[str, Any] = table.slice(index - start, 1).to_pylist()[0]
        return row

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
        except (OSError, ValueError, NotImplementedError) as error:
            raise VlmtuneError(
                f"row group {number + 1} of the file cannot be read ({_first_line(error)})",
                file=self.path,
            ) from error
        self._group = number, table
        return table


def open_parquet(path: Path) -> ParquetRows:
    """Raises VlmtuneError where the file is no parquet file or cannot be read."""
    import pyarrow.parquet

    stamp = stamp_of(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
            names = file.schema_arrow.names
    except (OSError, ValueError, NotImplementedError) as error:
        raise VlmtuneError(
            f"the file cannot be read as parquet ({_first_line(error)})", file=path
        ) from error
    check_columns(names, path)
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > LARGE_GROUP_BYTES:
        logger.info(
            "%s: row groups of up to %d MB, and one is read for each row that is in another than "
            "the last; data.streaming: true reads each once",
            path,
            largest >> 20,
        )
    return ParquetRows(path, stamp, list(accumulate(group.num_rows for group in groups)))


def check_columns(names: list[str], path: Path) -> None:
    """Raises VlmtuneError where two columns have one name."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise VlmtuneError("two columns have the same name", file=path, got=", ".join(twice))


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")
