"""What every streamed source gives: its rows from front to back, from any of them on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row not yet parsed. `number` is its place in the shard (0-based), `line` what messages say
    (1-based); only its shard knows what `content` is."""

    number: int
    line: int
    content: Any = field(default=None, repr=False)


class Shard(Protocol):
    """One file of a streamed source. Pickles into worker processes, which open files anew.

    `file` names it in messages; `base_dir` is what its pictures are relative to, unless the entry
    says otherwise.
    """

    @property
    def file(self) -> str: ...

    @property
    def base_dir(self) -> Path: ...

    def rows(self, start: int) -> Iterator[RawRow]:
        """The rows from number `start` on; those before are passed over, not parsed. Raises
        VlmtuneError where the file cannot be read on."""

    def parse(self, row: RawRow) -> Mapping[str, Any]:
        """The row as read. Raises SampleError with the place where it cannot be."""
