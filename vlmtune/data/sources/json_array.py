"""A JSON array of objects, or an object that holds one: items by their place in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.data.index import Stamp, Table, in_pieces, open_table, read_chunks, read_span, stamp_of
from vlmtune.data.sources.json_scan import CHUNK_BYTES, JsonScanner
from vlmtune.data.sources.json_text import parse_line
from vlmtune.data.types import Source


@dataclass(frozen=True)
class JsonItems:
    """Objects of a JSON file; `table` has the start and end of each."""

    path: Path
    stamp: Stamp
    table: Table

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return len(self.table)

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def read(self, index: int) -> Mapping[str, Any]:
        start, end = self.table.row(index)
        return parse_line(read_span(self.path, self.stamp, start, end), self.place(index))


def open_json_array(path: Path, *, cache_dir: Path) -> JsonItems:
    """Raises SampleError where the file is no JSON, VlmtuneError where it cannot be read."""
    stamp = stamp_of(path)
    table = open_table(
        "array",
        [(path, stamp)],
        columns=2,
        build=lambda extra: in_pieces(_scan(path), columns=2),
        cache_dir=cache_dir,
    )
    return JsonItems(path, stamp, table)


def _scan(path: Path) -> Iterator[tuple[int, int]]:
    scanner = JsonScanner(read_chunks(path, CHUNK_BYTES), path)
    for item in scanner.items():
        yield item.start, item.end
    scanner.check_end()
