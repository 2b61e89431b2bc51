"""A JSON array of objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmtune.data.sources.json_text import as_row, load_json, reason
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class JsonArray:
    path: Path
    items: list[Any]

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return len(self.items)

    def place(self, index: int) -> Source:
        return Source(str(self.path), index + 1)

    def read(self, index: int) -> Mapping[str, Any]:
        return as_row(self.items[index], self.place(index))


def open_json_array(path: Path) -> JsonArray:
    """Raises SampleError where the file is no JSON, VlmtuneError where it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VlmtuneError(f"the data file cannot be read ({error.strerror})", file=path) from error
    try:
        return JsonArray(path, load_json(content.removeprefix(_BOM)))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SampleError("the file is not UTF-8", file=path, line=line) from error
    except json.JSONDecodeError as error:
        raise SampleError(
            f"not JSON ({error.msg}, column {error.colno})", file=path, line=error.lineno
        ) from error
    except (ValueError, RecursionError) as error:
        raise SampleError(f"not JSON ({reason(error)})", file=path, line=1) from error
