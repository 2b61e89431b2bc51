"""JSON lines, by a byte offset for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.data.sources.json_text import parse_line
from vlmtune.data.types import Source
from vlmtune.errors import VlmtuneError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class JsonLines:
    """The lines of a file that are not blank: their numbers and where they start."""

    path: Path
    lines: list[int]
    offsets: list[int]

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return len(self.offsets)

    def place(self, index: int) -> Source:
        return Source(str(self.path), self.lines[index])

    def read(self, index: int) -> Mapping[str, Any]:
        with self.path.open("rb") as stream:
            stream.seek(self.offsets[index])
            line = stream.readline()
        return parse_line(line.removeprefix(_BOM), self.place(index))


def open_jsonl(path: Path) -> JsonLines:
    """Raises VlmtuneError where the file cannot be read."""
    lines, offsets, offset = [], [], 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.removeprefix(_BOM).strip():
                    lines.append(number)
                    offsets.append(offset)
                offset += len(line)
    except OSError as error:
        raise VlmtuneError(f"the data file cannot be read ({error.strerror})", file=path) from error
    return JsonLines(path, lines, offsets)
