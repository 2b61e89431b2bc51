"""Samples not trained on: listed in `skipped.jsonl`, counted, limited."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmtune.errors import VlmtuneError
from vlmtune.train.feed import LeftOut


class SkipLedger:
    """Every sample left out, once, in order of appearance; the same on all processes.

    Bad samples count against `max_bad_fraction` of `num_samples`; samples dropped for their length
    (`over_length: drop`) are listed and counted, not limited.
    """

    def __init__(self, path: Path, *, num_samples: int, max_bad_fraction: float) -> None:
        self._path = path
        self._num_samples = num_samples
        self._limit = max_bad_fraction * num_samples
        self._entries: dict[str, LeftOut] = {}

    @property
    def num_left_out(self) -> int:
        return len(self._entries)

    @property
    def num_bad(self) -> int:
        return sum(entry.is_bad for entry in self._entries.values())

    def add(self, entries: Iterable[LeftOut], *, write: bool) -> None:
        """Note what is new; raises `VlmtuneError` beyond the limit, on every process alike."""
        new = [e for e in entries if e.id not in self._entries]
        self._entries |= {e.id: e for e in new}
        if write:
            self._append(new)
        if self.num_bad > self._limit:
            last = [e for e in new if e.is_bad][-1]
            raise VlmtuneError(
                f"too many bad samples: {self.num_bad} of {self._num_samples}; "
                f"the last: {last.reason}",
                file=last.file,
                line=last.line,
                expected=f"at most {self._limit:.0f} (data.max_bad_fraction)",
                do="mend the data (data.on_bad_sample: error lists the bad rows) or raise "
                "data.max_bad_fraction",
            )

    def as_list(self) -> list[dict[str, Any]]:
        """For the checkpoint."""
        return [entry.as_dict() for entry in self._entries.values()]

    def restore(self, entries: Iterable[dict[str, Any]]) -> None:
        """Start from a checkpoint's entries, without those of an attempt after it."""
        self._entries = {str(entry["id"]): LeftOut(**entry) for entry in entries}

    def write(self) -> None:
        """Make the file list exactly what is known; afterwards `add` appends to it."""
        self._path.unlink(missing_ok=True)
        self._append(self._entries.values())

    def _append(self, entries: Iterable[LeftOut]) -> None:
        lines = [json.dumps(e.as_dict(), ensure_ascii=False) + "\n" for e in entries]
        if lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
