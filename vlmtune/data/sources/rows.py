"""What every source gives: its rows by number, at a memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vlmtune.data.types import Source


class Rows(Protocol):
    """The rows of one file or folder. Pickles into worker processes, which open files anew.

    `file` names it in messages; `base_dir` is what its pictures are relative to, unless the entry
    says otherwise.
    """

    @property
    def file(self) -> str: ...

    @property
    def base_dir(self) -> Path: ...

    def __len__(self) -> int: ...

    def place(self, index: int) -> Source:
        """Where row `index` (0-based) stands."""

    def read(self, index: int) -> Mapping[str, Any]:
        """The row as read: JSON values, and bytes where a column holds them. Raises SampleError
        with the place where it cannot be."""
