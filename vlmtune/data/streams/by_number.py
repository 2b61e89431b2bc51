"""Any source of rows by number, read from front to back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.data.sources.rows import Rows
from vlmtune.data.streams.shards import RawRow


@dataclass(frozen=True)
class NumberedShard:
    """What has an index anyway: JSON arrays, folders of pictures, Arrow files."""

    source: Rows

    @property
    def file(self) -> str:
        return self.source.file

    @property
    def base_dir(self) -> Path:
        return self.source.base_dir

    def rows(self, start: int) -> Iterator[RawRow]:
        for number in range(start, len(self.source)):
            yield RawRow(number, self.source.place(number).line)

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        return self.source.read(row.number)
