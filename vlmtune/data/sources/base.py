"""What every source gives, by number or from front to back, and the kept tables of where rows are.

file -> stamp (path, size, time, inode) -> the table in the cache, if it is of this stamp
                                         -> else built and written
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError
from vlmtune.files import Build, Numbers, Table, build_table, json_digest, load_table, write_table


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row that is not parsed yet: its number (0-based), the line that messages name (1-based),
    and how it is read, which raises SampleError with that place where the row is bad."""

    number: int
    line: int
    read: Callable[[], Mapping[str, Any]] = field(repr=False)


class Rows(Protocol):
    """The rows of one file or folder, by number or from front to back.

    Pickles into worker processes, which open files anew. `file` names it in messages; `base_dir`
    is what its pictures are relative to, unless the entry says otherwise. What was opened for
    streaming has no numbers: `iter_from` alone works then.
    """

    @property
    def file(self) -> str: ...

    @property
    def base_dir(self) -> Path: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Row `index` (0-based) as read: JSON values, and bytes where a column holds them. Raises
        SampleError with the place where it cannot be."""

    def place(self, index: int) -> Source:
        """Where row `index` stands."""

    def iter_from(self, start: int) -> Iterator[RawRow]:
        """The rows from number `start` on; those before are passed over, not parsed. Raises
        VlmtuneError where the file cannot be read on."""


def iter_by_number(rows: Rows, start: int) -> Iterator[RawRow]:
    """`iter_from` of rows that have an index anyway."""
    for number in range(start, len(rows)):
        yield RawRow(number, rows.place(number).line, partial(rows.__getitem__, number))


logger = logging.getLogger("vlmtune")

VERSION = 1
"""Raised when what the tables mean changes: older ones are then built anew."""

KEPT_FROM_BYTES = 1 << 20
"""Smaller files are looked through every time: their tables are not kept."""

_PIECE_ROWS = 8192


class Stamp(NamedTuple):
    """The state of a file that a table is of. `mtime_ns`: nanoseconds; `path`: real path."""

    path: str
    size: int
    mtime_ns: int
    inode: int


def stamp_of(path: Path) -> Stamp:
    """The state of a regular file. Raises VlmtuneError where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise VlmtuneError("no such data file", file=path, do="correct the path") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise VlmtuneError(f"the data file is {what}", file=path, expected="a file")
    return _stamp(path, status)


def unreadable(path: Path, error: OSError) -> VlmtuneError:
    """What is said of a data file that the system does not let be read."""
    return VlmtuneError(f"the data file cannot be read ({error.strerror or error})", file=path)


def check_unchanged(path: Path, stamp: Stamp) -> None:
    """Raises VlmtuneError where the file is no longer the one that was opened."""
    if stamp_of(path) != stamp:
        raise _changed(path)


def read_span(path: Path, stamp: Stamp, start: int, end: int) -> bytes:
    """The bytes from `start` up to `end` of a file.

    Every call opens the file for itself, so that threads and forked processes do not disturb each
    other and any number of shards needs one handle. Raises VlmtuneError where the file is gone or
    is not the one that was opened.
    """
    try:
        with path.open("rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            if (status.st_size, status.st_mtime_ns, status.st_ino) != stamp[1:]:
                raise _changed(path)
            content = os.pread(stream.fileno(), end - start, start)
            while len(content) < end - start:
                more = os.pread(stream.fileno(), end - start - len(content), start + len(content))
                if not more:
                    raise _changed(path)
                content += more
            return content
    except FileNotFoundError as error:
        raise VlmtuneError(
            "the data file was removed after it was opened",
            file=path,
            do="restore it and start again",
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_chunks(path: Path, num_bytes: int) -> Iterator[bytes]:
    """A file from front to back. Raises VlmtuneError where it cannot be read."""
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(num_bytes):
                yield chunk
    except OSError as error:
        raise unreadable(path, error) from error


def in_pieces(rows: Iterable[Sequence[int]], *, columns: int) -> Iterator[Numbers]:
    """Single rows as the pieces that a table is built of."""
    remaining = iter(rows)
    while piece := list(islice(remaining, _PIECE_ROWS)):
        yield np.array(piece, dtype=np.int64).reshape(-1, columns)


def open_table(
    kind: str, files: Sequence[tuple[Path, Stamp]], *, columns: int, build: Build, cache_dir: Path
) -> Table:
    """The table `kind` of some files, from the cache where it is of their present state.

    A cache that cannot be written to is said once, and the table kept in memory. Raises what
    `build` raises, and VlmtuneError where a file changes meanwhile.
    """
    stamps = [stamp for _, stamp in files]
    key = bytes.fromhex(json_digest([VERSION, kind, columns, stamps]))
    small = sum(stamp.size for stamp in stamps) < KEPT_FROM_BYTES
    names = json_digest([stamp.path for stamp in stamps])
    place = cache_dir / "index" / f"{kind}-{names[:32]}.index"
    table = None if small else load_table(place, key)
    if table is not None:
        return table
    if not small:
        try:
            write_table(place, key, build, columns=columns)
            table = load_table(place, key)
        except OSError as error:
            _log_not_kept(str(place.parent), error.strerror or str(error))
    if table is None:
        table = build_table(build, columns=columns)
    for path, stamp in files:
        check_unchanged(path, stamp)
    return table


def _stamp(path: Path, status: os.stat_result) -> Stamp:
    return Stamp(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino)


def _changed(path: Path) -> VlmtuneError:
    return VlmtuneError(
        "the data file has changed since it was opened",
        file=path,
        expected="a file that does not change while it is read",
        do="start again",
    )


@cache
def _log_not_kept(folder: str, reason: str) -> None:
    logger.warning(
        "%s: not writable (%s); indexes stay in memory and are rebuilt next time",
        folder,
        reason,
    )


@dataclass(frozen=True)
class SpanRows:
    """Rows that are spans of bytes in `files`, the first of which names them.

    `index` has for each row the start and end of its span in each file, -1 where it has none
    there; with an odd number of columns, its line is the last. None: opened for streaming. A row
    is `parse(*contents, source)`. `scan(start)` reads from front to back without the index.
    """

    files: tuple[tuple[Path, Stamp], ...]
    index: Table | None
    parse: Callable[..., Mapping[str, Any]]
    scan: Callable[[int], Iterator[RawRow]] | None = None

    @property
    def file(self) -> str:
        return str(self.files[0][0])

    @property
    def base_dir(self) -> Path:
        return self.files[0][0].parent

    @property
    def table(self) -> Table:
        assert self.index is not None, "opened for streaming"
        return self.index

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = self.table.row(index)
        contents = [
            None if start < 0 else read_span(*file, start, end)
            for file, start, end in zip(self.files, row[::2], row[1::2])
        ]
        return self.parse(*contents, self._source(index, row))

    def place(self, index: int) -> Source:
        return self._source(index, self.table.row(index))

    def iter_from(self, start: int) -> Iterator[RawRow]:
        return iter_by_number(self, start) if self.scan is None else self.scan(start)

    def _source(self, index: int, row: list[int]) -> Source:
        return Source(self.file, row[-1] if len(row) % 2 else index + 1)
