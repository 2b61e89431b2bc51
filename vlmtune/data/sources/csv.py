"""CSV and TSV with a header row: records by their place in the file.

A record may go over several lines where a cell is quoted. Cells are texts; a row is
`{name of the column: cell}`. Excel's line `sep=;` in front of the header is understood, and so is
`a, b, c`: where each name of the header has a space in front, those of the cells go as well.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from vlmtune.data.sources.base import (
    SpanRows,
    in_pieces,
    open_table,
    read_chunks,
    stamp_of,
)
from vlmtune.data.sources.json_text import BOM
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError, shorten
from vlmtune.files import Extra, Numbers

MAX_CELL_CHARACTERS = 1 << 26
"""Room for a picture in base64; a quote that is not closed is found no later."""

_CHUNK_BYTES = 1 << 20
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_EXCEL_LINE = re.compile(rb"sep=([,;|\t])\s*", re.IGNORECASE)


class Dialect(NamedTuple):
    """What separates cells, and whether a space after it is part of that."""

    delimiter: str
    skips_spaces: bool


def open_delimited(path: Path, *, cache_dir: Path) -> SpanRows:
    """The records after the header.

    Raises VlmtuneError where the file cannot be read, or its header or quotes make no sense.
    """
    files = ((path, stamp_of(path)),)
    dialect = _sniff(path)

    def build(extra: Extra) -> Iterable[Numbers]:
        return in_pieces(_scan(path, dialect, extra), columns=3)

    kind = f"records-{ord(dialect.delimiter)}"
    table = open_table(kind, files, columns=3, build=build, cache_dir=cache_dir)
    columns = _columns(table.extra.get("header", []), path)
    return SpanRows(files, table, partial(_parse, columns=columns, dialect=dialect))


def _sniff(path: Path) -> Dialect:
    """The delimiter that Excel's line names, or that the header has the most of, the first of
    equals; TSV has tabs."""
    head = next(read_chunks(path, _CHUNK_BYTES), b"").removeprefix(BOM)
    line, _, rest = head.lstrip(b"\r\n").partition(b"\n")
    named = _EXCEL_LINE.fullmatch(line)
    header = (rest.partition(b"\n")[0] if named else line).decode("latin-1")
    if path.suffix.lower() in (".tsv", ".tab"):
        delimiter = "\t"
    else:
        delimiter = named[1].decode() if named else max(_NAMES, key=header.count)
    count = header.count(delimiter)
    return Dialect(delimiter, count > 0 and header.count(f"{delimiter} ") == count)


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


def _scan(path: Path, dialect: Dialect, extra: Extra) -> Iterator[tuple[int, int, int]]:
    """Start, end (bytes) and first line of the records after the header, which goes to `extra`."""
    lines = _Lines(path)
    reader = _reader(lines, dialect)
    is_first = True
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
                    f"the header cannot be parsed ({error})", file=path, line=line
                ) from error
            cells = ["bad", "row"]  # said when it is read
        if len(cells) == 1 and not cells[0].strip() or not cells:
            continue
        if "header" in extra:
            yield start, lines.num_bytes, line
        elif not (is_first and _EXCEL_LINE.fullmatch(dialect.delimiter.join(cells).encode())):
            extra["header"] = _decoded(cells, path, line)
        is_first = False


def _decoded(header: list[str], path: Path, line: int) -> list[str]:
    try:
        return [cell.encode("latin-1").decode("utf-8") for cell in header]
    except UnicodeDecodeError as error:
        raise VlmtuneError(
            "the names of the columns are not UTF-8",
            file=path,
            line=line,
            do="save the file as UTF-8",
        ) from error


def _reader(lines: Iterable[str], dialect: Dialect) -> Iterator[list[str]]:
    # The limit is one for the process; Python's own is too small for a picture in base64.
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    return csv.reader(
        lines, delimiter=dialect.delimiter, skipinitialspace=dialect.skips_spaces, strict=True
    )


def _parse(
    content: bytes, source: Source, *, columns: tuple[str, ...], dialect: Dialect
) -> Mapping[str, Any]:
    """The row of a record. Raises SampleError."""
    cells = _cells(content, source, dialect)
    if not any(cell.strip() for cell in cells):
        raise SampleError(
            "all cells of the row are empty",
            at=source,
            do="remove the line; the last rows of a table are often empty",
        )
    if len(cells) != len(columns):
        separators, more = _NAMES[dialect.delimiter], cells[len(columns) :]
        raise SampleError(
            "the row and the header have different numbers of cells",
            at=source,
            got=len(cells),
            expected=f"{len(columns)}: {shorten(', '.join(columns))}",
            do=f"remove the {separators} at its end"
            if more and not any(cell.strip() for cell in more)
            else f"quote cells that hold {separators}",
        )
    return dict(zip(columns, cells, strict=True))


def _cells(content: bytes, source: Source, dialect: Dialect) -> list[str]:
    try:
        text = content.removeprefix(BOM).decode("utf-8")
        return next(_reader(io.StringIO(text, newline=""), dialect))
    except UnicodeDecodeError as error:
        raise SampleError(
            f"the row is not UTF-8 (byte {error.start + 1})",
            at=source,
            do="save the file as UTF-8",
        ) from error
    except csv.Error as error:
        separators = _NAMES[dialect.delimiter]
        raise SampleError(
            f"the row cannot be parsed ({error})",
            at=source,
            expected=f'cells between {separators}, with quotes as in "a ""b"" c"',
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
            expected="a header with unique names",
        )
    return tuple(columns)
