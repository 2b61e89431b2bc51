"""JSON lines from front to back, plain or compressed (`.gz`)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from vlmtune.data.sources.json_text import parse_line
from vlmtune.data.streams.shards import RawRow
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError

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
