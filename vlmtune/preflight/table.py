"""What is known of a set when every row was looked at: a few numbers a row, problems in words.

Numbers only are kept of a row that can be used, some 60 bytes: a million of them are 60 MB.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from vlmtune.data.duplicates import DigestTable
from vlmtune.data.types import Source
from vlmtune.errors import SampleError
from vlmtune.preflight.problems import KEPT_PER_KIND, kind_of
from vlmtune.preflight.rows import RowFailure, RowOutcome, Stage

GOOD, NOT_A_ROW, NO_MEDIA, NOT_ENCODED, TOO_LONG = range(5)
"""What a row is. The reader leaves out the second and the third; training meets the last two."""

_STATES: dict[Stage, int] = {"row": NOT_A_ROW, "media": NO_MEDIA, "encode": NOT_ENCODED}


@dataclass(frozen=True)
class Failed:
    """A row that is not used. `number`: its place in the set (0-based)."""

    number: int
    id: str
    source: Source
    state: int
    error: SampleError


@dataclass
class Kept:
    """The failures and hints of a kind: the first `KEPT_PER_KIND`, and how many there are."""

    count: int = 0
    failed: list[Failed] = field(default_factory=list)
    hints: list[tuple[Source, str]] = field(default_factory=list)


class RowTable:
    """Filled by `add`, row after row; `finish` afterwards takes out what has an id of another."""

    def __init__(self) -> None:
        self.states = array("B")
        self.lengths = array("I")  # of the rows the model gets, one after the other
        self.lengths_of = array("B")  # how many of them a row of the set has
        self.supervised = array("I")
        self.media = array("I")
        self.images = array("I")
        self.notes: Counter[str] = Counter()
        self.failures: dict[tuple[int, str], Kept] = defaultdict(Kept)
        self.hints: dict[str, Kept] = defaultdict(Kept)
        self.digests = DigestTable()
        self.digest_rows = array("Q")
        self.media_bytes = 0
        self.media_of_bytes = 0
        self._ids = array("Q")
        self._lines = array("q")
        self._files = array("I")
        self._file_names: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.states)

    def add(self, outcome: RowOutcome) -> None:
        failure, measure = outcome.failure, outcome.measure
        number = len(self)
        state = GOOD
        if failure is not None:
            state = TOO_LONG if failure.is_too_long else _STATES[failure.stage]
            self._add_failure(number, outcome, state, failure)
        self.states.append(state)
        self._ids.append(0 if outcome.id is None else _digest(outcome.id))
        self._lines.append(outcome.source.line)
        self._files.append(self._file_names.setdefault(outcome.source.file, len(self._file_names)))
        lengths = () if measure is None else measure.lengths
        self.lengths.extend(lengths)
        self.lengths_of.append(len(lengths))
        self.supervised.append(0 if measure is None else measure.num_supervised)
        self.media.append(0 if measure is None else measure.num_media)
        self.images.append(0 if measure is None else measure.num_images)
        if measure is not None:
            self.notes.update(measure.notes)
            if measure.media_bytes is not None and measure.num_media:
                self.media_bytes += measure.media_bytes
                self.media_of_bytes += measure.num_media
        if outcome.digests is not None:
            self.digests.add(outcome.digests)
            self.digest_rows.append(number)
        for kind, message in outcome.odd:
            kept = self.hints[kind]
            kept.count += 1
            if len(kept.hints) < KEPT_PER_KIND:
                kept.hints.append((outcome.source, message))

    def source(self, number: int) -> Source:
        """Where row `number` (0-based) stands."""
        names = list(self._file_names)
        return Source(names[self._files[number]], self._lines[number])

    def count(self, *states: int) -> int:
        return sum(int((self._states == state).sum()) for state in states)

    def rows(self, *states: int) -> np.ndarray:
        """The numbers of the rows in one of `states`, ascending."""
        return np.flatnonzero(np.isin(self._states, states))

    def repeated_ids(self) -> Iterator[tuple[int, int]]:
        """(row, the first row with the same id) of every row whose id is taken."""
        ids = np.frombuffer(self._ids, dtype=np.uint64) if self._ids else np.empty(0, np.uint64)
        rows = np.flatnonzero(ids)
        _, first, group = np.unique(ids[rows], return_index=True, return_inverse=True)
        for at in np.flatnonzero(first[group] != np.arange(len(rows))):
            yield int(rows[at]), int(rows[first[group[at]]])

    def take_out(self, failed: Failed) -> None:
        """Make a row one that is not used, and if it is none already, for this reason instead."""
        before = [key for key in self.failures if key[0] == self.states[failed.number]]
        for key in sorted(before, key=lambda key: not self._names(key, failed.number)):
            kept = self.failures[key]
            # Where its place was not kept, of any kind that has such rows.
            if self._names(key, failed.number) or kept.count > len(kept.failed):
                kept.failed = [f for f in kept.failed if f.number != failed.number]
                kept.count -= 1
                if not kept.count:
                    del self.failures[key]
                break
        self.states[failed.number] = failed.state
        self._keep(failed)

    def _names(self, key: tuple[int, str], number: int) -> bool:
        return any(failed.number == number for failed in self.failures[key].failed)

    def row_lengths(self) -> list[Sequence[int]]:
        """For each row of the set, the lengths of the rows the model gets; none where unusable."""
        ends = np.cumsum(np.frombuffer(self.lengths_of, dtype=np.uint8), dtype=np.int64)
        starts = ends - np.frombuffer(self.lengths_of, dtype=np.uint8)
        return [self.lengths[start:end] for start, end in zip(starts, ends, strict=True)]

    def num_tokens(self) -> np.ndarray:
        """Tokens of each row of the set; 0 where unusable."""
        counts = np.frombuffer(self.lengths_of, dtype=np.uint8)
        totals = np.zeros(len(counts), dtype=np.int64)
        owners = np.repeat(np.arange(len(counts)), counts)
        np.add.at(totals, owners, np.frombuffer(self.lengths, dtype=np.uint32))
        return totals

    @property
    def _states(self) -> np.ndarray:
        return np.frombuffer(self.states, dtype=np.uint8) if self.states else np.empty(0, np.uint8)

    def _add_failure(
        self, number: int, outcome: RowOutcome, state: int, failure: RowFailure
    ) -> None:
        # The reader names a row that it leaves out by its place, training by its id.
        by_place = state in (NOT_A_ROW, NO_MEDIA) or outcome.id is None
        name = outcome.fallback_id if by_place else str(outcome.id)
        self._keep(Failed(number, name, outcome.source, state, failure.error))

    def _keep(self, failed: Failed) -> None:
        kept = self.failures[failed.state, kind_of(failed.error.message)]
        kept.count += 1
        if len(kept.failed) < KEPT_PER_KIND:
            kept.failed.append(failed)


def _digest(text: str) -> int:
    """Never 0, which stands for no id."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") | 1
