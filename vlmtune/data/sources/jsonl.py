"""Reads JSON lines by number or from front to back, plain or compressed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, cast

import numpy as np

from vlmtune.data.sources.base import (
    RawRow,
    SpanRows,
    open_table,
    read_chunks,
    stamp_of,
)
from vlmtune.data.sources.json_text import BOM, parse_line
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError
from vlmtune.files import Numbers

_CHUNK_BYTES = 4 << 20
_LINE_BREAK = 10
_IS_BLANK = np.isin(np.arange(256), list(b" \t\n\r\x0b\x0c"))


def open_jsonl(path: Path, *, cache_dir: Path, streaming: bool = False) -> SpanRows:
    """The lines of a file that are not blank. Raises VlmtuneError where it cannot be read."""
    files = ((path, stamp_of(path)),)
    table = None
    if not streaming:
        table = open_table(
            "jsonl", files, columns=3, build=lambda extra: scan_lines(path), cache_dir=cache_dir
        )
    return SpanRows(files, table, parse_line, scan=partial(_lines_from, path))


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


def _lines_from(path: Path, start: int) -> Iterator[RawRow]:
    number, file = 0, str(path)
    with open_bytes(path) as stream:
        for line, content in enumerate(stream, start=1):
            content = content.removeprefix(BOM)
            if not content.strip():
                continue
            if number >= start:
                yield RawRow(number, line, partial(parse_line, content, Source(file, line)))
            number += 1


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, uncompressed where its name ends in `.gz`. Within, what shows that it
    cannot be read on is raised as VlmtuneError."""
    is_compressed = path.name.lower().endswith((".gz", ".tgz"))
    try:
        with cast(IO[bytes], gzip.open(path) if is_compressed else path.open("rb")) as stream:
            yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VlmtuneError(
            f"the compressed data file is broken or cut off ({error})",
            file=path,
            do="fetch or write the file again",
        ) from error
    except OSError as error:
        raise VlmtuneError(f"the data file cannot be read ({error.strerror})", file=path) from error
