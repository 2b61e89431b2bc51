"""Parquet from front to back; row groups before the first row wanted are not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.data.sources.arrow import ARROW_ERRORS, check_columns, row_at
from vlmtune.data.streams.shards import RawRow
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError

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
