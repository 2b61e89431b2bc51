"""Samples not trained on: listed in `skipped.jsonl`, counted, limited."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmtune.errors import VlmtuneError
from vlmtune.train.feed import LeftOut


def allowed_bad(max_bad_fraction: float, num_samples: int) -> int:
    """How many of the samples may be bad."""
    # 0.29 * 100 is 28.999999999999996.
    return math.floor(round(max_bad_fraction * num_samples, 6))


_Place = tuple[str, str, int]


class SkipLedger:
    """Every sample left out, once, in order of appearance; the same on all processes.

    Bad samples count against `max_bad_fraction` of `num_samples`; samples dropped for their length
    (`over_length: drop`) are listed and counted, not limited. `counts_repeats`: `num_samples` are
    those that the run draws, not those there are, and a bad one counts each time it is drawn.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_samples: int,
        max_bad_fraction: float,
        counts_repeats: bool = False,
    ) -> None:
        self._path = path
        self._num_samples = num_samples
        self._limit = allowed_bad(max_bad_fraction, num_samples)
        self._counts_repeats = counts_repeats
        self._entries: dict[_Place, LeftOut] = {}
        self.num_bad = 0

    @property
    def num_left_out(self) -> int:
        return len(self._entries)

    def add(self, entries: Iterable[LeftOut], *, write: bool) -> None:
        """Note what is new; raises `VlmtuneError` beyond the limit, on every process alike."""
        drawn = list(entries)
        new = list({_place(e): e for e in drawn if _place(e) not in self._entries}.values())
        self._entries |= {_place(e): e for e in new}
        if write:
            self._append(new)
        bad = [e for e in (drawn if self._counts_repeats else new) if e.is_bad]
        self.num_bad += len(bad)
        if bad and self.num_bad > self._limit:
            last = bad[-1]
            raise VlmtuneError(
                f"too many bad samples: {self.num_bad} of {self._num_samples}; "
                f"the last: {last.reason}",
                file=last.file,
                line=last.line,
                expected=f"at most {self._limit} (data.max_bad_fraction)",
                do="mend the data (data.on_bad_sample: error lists the bad rows) or raise "
                "data.max_bad_fraction",
            )

    def as_list(self) -> list[dict[str, Any]]:
        """For the checkpoint."""
        return [entry.as_dict() for entry in self._entries.values()]

    def restore(self, entries: Iterable[dict[str, Any]], *, num_bad: int | None = None) -> None:
        """Start from a checkpoint's entries, without those of an attempt after it. `num_bad`:
        where it is more than one for each bad entry."""
        restored = [LeftOut(**entry) for entry in entries]
        self._entries = {_place(entry): entry for entry in restored}
        counted = sum(entry.is_bad for entry in restored)
        self.num_bad = counted if num_bad is None else num_bad

    def write(self) -> None:
        """Make the file list exactly what is known; afterwards `add` appends to it."""
        self._path.unlink(missing_ok=True)
        self._append(self._entries.values())

    def _append(self, entries: Iterable[LeftOut]) -> None:
        lines = [json.dumps(e.as_dict(), ensure_ascii=False) + "\n" for e in entries]
        if lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)


def _place(entry: LeftOut) -> _Place:
    """What tells samples apart: of large sets and of streams nobody checks that ids are unique."""
    return entry.id, entry.file, entry.line
