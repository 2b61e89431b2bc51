"""CSV and TSV with a header row: records by their place in the file.

A record may go over several lines where a cell is quoted. Cells are texts; a row is
`{name of the column: cell}`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from vlmtune.data.index import (
    Extra,
    Numbers,
    Stamp,
    Table,
    in_pieces,
    open_table,
    read_chunks,
    read_span,
    stamp_of,
)
from vlmtune.data.sources.json_text import BOM
from vlmtune.data.text import shorten
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError

MAX_CELL_CHARACTERS = 1 << 26
"""Room for a picture in base64; a quote that is not closed is found no later."""

_CHUNK_BYTES = 1 << 20
_DELIMITERS = (",", "\t", ";")
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons"}


@dataclass(frozen=True)
class DelimitedRows:
    """The records after the header; `table` has the start, end and first line of each."""

    path: Path
    stamp: Stamp
    table: Table
    columns: tuple[str, ...]
    delimiter: str

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
        cells = _cells(read_span(self.path, self.stamp, start, end), self, line)
        if len(cells) != len(self.columns):
            raise SampleError(
                "the row has another number of cells than the header",
                file=self.path,
                line=line,
                got=len(cells),
                expected=f"{len(self.columns)}: {shorten(', '.join(self.columns))}",
                do=f"quote cells that hold {_NAMES[self.delimiter]}",
            )
        return dict(zip(self.columns, cells, strict=True))


def open_delimited(path: Path, *, cache_dir: Path) -> DelimitedRows:
    """Raises VlmtuneError where the file cannot be read, or its header or quotes make no sense."""
    stamp = stamp_of(path)
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else _sniff(path)

    def build(extra: Extra) -> Iterable[Numbers]:
        return in_pieces(_scan(path, delimiter, extra), columns=3)

    table = open_table(
        f"cells-{ord(delimiter)}", [(path, stamp)], columns=3, build=build, cache_dir=cache_dir
    )
    columns = _columns(table.extra.get("header", []), path)
    return DelimitedRows(path, stamp, table, columns, delimiter)


def _sniff(path: Path) -> str:
    """The delimiter that the first line has the most of, the first of equals."""
    head = next(read_chunks(path, _CHUNK_BYTES), b"").removeprefix(BOM)
    line = head.lstrip(b"\r\n").split(b"\n")[0].decode("latin-1")
    return max(_DELIMITERS, key=line.count)


class _Lines:
    """The lines of a file, as what a csv reader reads from; knows how far it has got."""

    def __init__(self, path: Path) -> None:
        self._lines = _split_lines(read_chunks(path, _CHUNK_BYTES))
        self.num_bytes, self.number = 0, 0  # taken so far

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        is_first, self.number = self.number == 0, self.number + 1
        self.num_bytes += len(line)
        # Only the structure is looked for, and that is ASCII; cells are decoded when they are read.
        return (line.removeprefix(BOM) if is_first else line).decode("latin-1")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        if lines:
            yield b"".join(chain(begun, (lines[0], b"\n")))
            yield from (line + b"\n" for line in lines[1:])
            begun = []
        begun.append(rest)
    if last := b"".join(begun):
        yield last


def _scan(path: Path, delimiter: str, extra: Extra) -> Iterator[tuple[int, int, int]]:
    """Start, end (bytes) and first line of the records after the header, which goes to `extra`."""
    lines = _Lines(path)
    reader = _reader(lines, delimiter)
    while True:
        start, line = lines.num_bytes, lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error) or "field limit" in str(error):
                raise VlmtuneError(
                    "a quote in this row is not closed",
                    file=path,
                    line=line,
                    do='close it; a quote that is text is written ""',
                ) from error
            if "header" not in extra:
                raise VlmtuneError(
                    f"the names of the columns cannot be told apart ({error})", file=path, line=line
                ) from error
            cells = ["bad", "row"]  # said when it is read
        if len(cells) == 1 and not cells[0].strip() or not cells:
            continue
        if "header" in extra:
            yield start, lines.num_bytes, line
        else:
            extra["header"] = [cell.encode("latin-1").decode("utf-8", "replace") for cell in cells]


def _reader(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    # The limit is one for the process; Python's own is too small for a picture in base64.
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _cells(content: bytes, rows: DelimitedRows, line: int) -> list[str]:
    try:
        text = content.removeprefix(BOM).decode("utf-8")
        return next(_reader(io.StringIO(text, newline=""), rows.delimiter))
    except UnicodeDecodeError as error:
        raise SampleError(
            f"the row is not UTF-8 (byte {error.start + 1})",
            file=rows.path,
            line=line,
            do="save the file as UTF-8",
        ) from error
    except csv.Error as error:
        raise SampleError(
            f"the row's cells cannot be told apart ({error})",
            file=rows.path,
            line=line,
            expected=f'cells between {_NAMES[rows.delimiter]}, with quotes as in "a ""b"" c"',
        ) from error


def _columns(header: list[str], path: Path) -> tuple[str, ...]:
    """The names of the columns; one without a name is called by its number."""
    columns = [name.strip() or f"column {at}" for at, name in enumerate(header, start=1)]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise VlmtuneError(
            "two columns have the same name",
            file=path,
            line=1,
            got=", ".join(twice),
            expected="a first row of names, each of its own",
        )
    return tuple(columns)
