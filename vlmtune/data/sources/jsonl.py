"""Reads JSON lines by number or from front to back, plain or compressed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from vlmtune.data.sources.base import (
    RawRow,
    Stamp,
    open_table,
    read_chunks,
    read_span,
    stamp_of,
)
from vlmtune.data.sources.json_text import BOM, parse_line
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError
from vlmtune.files import Numbers, Table

_CHUNK_BYTES = 4 << 20
_LINE_BREAK = 10
_IS_BLANK = np.isin(np.arange(256), list(b" \t\n\r\x0b\x0c"))


@dataclass(frozen=True)
class JsonLines:
    """The lines of a file that are not blank; `table` has the start, end and number of each."""

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
        return Source(self.file, self.table.row(index)[2])

    def read(self, index: int) -> Mapping[str, Any]:
        start, end, line = self.table.row(index)
        return parse_line(read_span(self.path, self.stamp, start, end), Source(self.file, line))


def open_jsonl(path: Path, *, cache_dir: Path) -> JsonLines:
    """Raises VlmtuneError where the file cannot be read."""
    stamp = stamp_of(path)
    table = open_table(
        "jsonl",
        [(path, stamp)],
        columns=3,
        build=lambda extra: scan_lines(path),
        cache_dir=cache_dir,
    )
    return JsonLines(path, stamp, table)


def scan_lines(path: Path, *, chunk_bytes: int = _CHUNK_BYTES) -> Iterator[Numbers]:
    """Start, end (bytes) and number (1-based) of the lines that are not blank, in pieces (n, 3).

    A byte order mark is no part of the first line, nor the line break of any. Raises VlmtuneError.
    """
    offset, number = 0, 1
    start, is_begun = 0, False  # of the line that goes on: not blank so far
    for chunk in read_chunks(path, chunk_bytes):
        skipped = len(BOM) if offset == 0 and chunk.startswith(BOM) else 0
        start += skipped
        codes = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(codes == _LINE_BREAK)  # (n,) in the chunk
        if len(ends) == 0:
            is_begun = is_begun or bool(chunk[skipped:].strip())
            offset += len(chunk)
            continue
        begins = np.concatenate(([skipped], ends[:-1] + 1))
        is_blank = _IS_BLANK[codes[begins]]
        for at in np.flatnonzero(is_blank):
            is_blank[at] = not chunk[begins[at] : ends[at]].strip()
        is_blank[0] &= not is_begun
        starts = begins + offset
        starts[0] = start
        lines = np.arange(number, number + len(ends))
        yield np.stack([starts, ends + offset, lines], axis=1)[~is_blank]
        rest = int(ends[-1]) + 1
        start, is_begun = offset + rest, bool(chunk[rest:].strip())
        number += len(ends)
        offset += len(chunk)
    if is_begun:
        yield np.array([[start, offset, number]], dtype=np.int64)


_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class LineShard:
    """The lines of `path` that are not blank."""

    path: Path

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def rows(self, start: int) -> Iterator[RawRow]:
        number = 0
        with open_bytes(self.path) as stream:
            for line, content in enumerate(stream, start=1):
                if not content.removeprefix(_BOM).strip():
                    continue
                if number >= start:
                    yield RawRow(number, line, content)
                number += 1

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        return parse_line(row.content.removeprefix(_BOM), Source(self.file, row.line))


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, uncompressed where its name ends in `.gz`. Within, what shows that it
    cannot be read on is raised as VlmtuneError."""
    try:
        with cast(
            IO[bytes],
            gzip.open(path) if path.name.lower().endswith((".gz", ".tgz")) else path.open("rb"),
        ) as f:
            yield f
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VlmtuneError(
            f"the compressed data file is broken or cut off ({error})",
            file=path,
            do="fetch or write the file again",
        ) from error
    except OSError as error:
        raise VlmtuneError(f"the data file cannot be read ({error.strerror})", file=path) from error
