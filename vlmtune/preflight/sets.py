"""Checks one set of the recipe: from its entries to its problems.

For a usable row only numbers are kept, about 60 bytes: a million rows take 60 MB.

entries -> files (or a stream) -> check_rows -> RowTable -> problems, by the rules of the feed
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from vlmtune.data.dataset import (
    SCANNED_OUTRIGHT,
    OpenFile,
    iter_rows,
    media_policy_of,
    num_rows,
    open_files,
    repeated_id,
)
from vlmtune.data.stream import Stream, open_stream
from vlmtune.data.tools.duplicates import DigestTable, duplicates
from vlmtune.data.types import Conversation, Source
from vlmtune.errors import SampleError, VlmtuneError, plural
from vlmtune.evaluation.references import fixed_subset
from vlmtune.files import short_digest
from vlmtune.preflight.problems import KEPT_PER_KIND, Problems, Severity, kind_of
from vlmtune.preflight.rows import (
    Inexact,
    RowFailure,
    RowOutcome,
    RowSettings,
    Stage,
    check_rows,
    useful_workers,
)
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.schema import Recipe
from vlmtune.train.feed import LazySample
from vlmtune.train.run_folder import allowed_bad

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
        self._ids.append(0 if outcome.id is None else short_digest(outcome.id) | 1)
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


SetName = Literal["data.train", "data.eval", "eval.guard.data"]
ShowProgress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class CheckedSet:
    """`files` are empty where the set is streamed. `num_rows`: those there are, of which the
    table has `len(table)`. `by_size`: whether lengths could be told from picture sizes."""

    name: SetName
    files: list[OpenFile]
    table: RowTable
    num_rows: int
    by_size: bool

    @property
    def is_partial(self) -> bool:
        return len(self.table) < self.num_rows

    @property
    def share(self) -> float:
        """The share of the rows that were looked at."""
        return len(self.table) / self.num_rows if self.num_rows else 1.0

    def conversations(self, chosen: Set[int]) -> list[Conversation]:
        """Those of some rows of the table, read again. Raises SampleError for one that is bad."""
        numbers = sample_numbers(self.num_rows, len(self.table))
        rows = iter_rows(self.files, [numbers[at] for at in sorted(chosen)])
        return [row.conversation() for row in rows]


def sample_numbers(total: int, wanted: int | None) -> Sequence[int]:
    """The numbers of `wanted` of `total` rows, from all over them; of all where fewer or None."""
    if wanted is None or wanted >= total:
        return range(total)
    return [number * total // wanted for number in range(wanted)]


def open_set(
    entries: Sequence[DataEntry], recipe: Recipe, *, streamed: bool
) -> list[OpenFile] | Stream:
    """The files of some entries, or their stream. Raises VlmtuneError as training does."""
    media_policy = media_policy_of(recipe.data)
    cache_dir = media_policy.cache_folder
    if streamed:
        return open_stream(
            entries,
            seed=recipe.seed,
            block_rows=recipe.data.shuffle_buffer,
            media_policy=media_policy,
            cache_dir=cache_dir,
        )
    return open_files(entries, media_policy=media_policy, cache_dir=cache_dir)


def look_at(
    name: SetName,
    opened: list[OpenFile] | Stream,
    settings: RowSettings,
    *,
    num_workers: int | None,
    max_samples: int | None,
    show_progress: ShowProgress,
) -> CheckedSet:
    """Look at every row of a set, or at `max_samples` of them. Raises VlmtuneError where a file
    cannot be read on."""
    rows: Callable[[], Iterable[LazySample]]
    if isinstance(opened, Stream):
        files, total, expected = [], 0, 0
        rows = partial(opened.every_row, max_samples)
    else:
        files, total = opened, num_rows(opened)
        numbers = sample_numbers(total, max_samples)
        rows, expected = partial(iter_rows, files, numbers), len(numbers)
    workers = useful_workers(expected or SCANNED_OUTRIGHT, asked=num_workers)
    while True:
        table = RowTable()
        try:
            with show_progress(f"checking {name}", expected) as progressed:
                progressed(0)
                for outcome in check_rows(rows, settings, num_workers=workers):
                    table.add(outcome)
                    if len(table) % 100 == 0:
                        progressed(len(table))
                progressed(len(table))
        except Inexact:
            settings = settings.exactly()
            continue
        break
    return CheckedSet(name, files, table, total or len(table), settings.by_size)


def look_at_repeated_ids(checked: CheckedSet, problems: Problems) -> None:
    """Of held-out rows that share an id the first is used; training uses all, with a warning."""
    table = checked.table
    taken = list(table.repeated_ids())
    if not taken or not checked.files or checked.is_partial:
        return
    if checked.name == "data.train":
        (number, first), *_ = taken
        source, other = table.source(number), table.source(first)
        problems.add(
            "warning",
            f"{checked.name}: {plural(len(taken), 'row repeats', 'rows repeat')} the id of an "
            "earlier row; all are trained on; the first repeats the id of "
            f"{other.file}:{other.line}",
            file=source.file,
            line=source.line,
        )
        return
    rows = iter_rows(checked.files, [number for number, _ in taken])
    for (number, first), row in zip(taken, rows, strict=True):
        source, other = table.source(number), table.source(first)
        where = f"at {other.file}:{other.line}"
        error = repeated_id(row.conversation().id, source, where)
        table.take_out(Failed(number, row.id, source, NOT_A_ROW, error))


def add_failures(
    checked: CheckedSet, problems: Problems, *, recipe: Recipe, chosen: frozenset[int] | None
) -> None:
    """The bad rows of a set as problems, by what training does with them. `chosen`: the rows that
    are evaluated on during training; None: all are used."""
    skips = recipe.data.on_bad_sample == "skip"
    for (state, kind), kept in checked.table.failures.items():
        if state == TOO_LONG:
            continue
        usual: Severity = "warning" if skips else "error"
        for failed in kept.failed:
            is_used = chosen is None or state != NOT_ENCODED or failed.number in chosen
            problems.add_error(failed.error, severity=usual if is_used else "warning")
        problems.add_uncounted(usual, kind, kept.count - len(kept.failed))
    _add_too_long(checked, problems)
    for kind, hints in checked.table.hints.items():
        for source, message in hints.hints:
            problems.add("warning", message, file=source.file, line=source.line, kind=kind)
        problems.add_uncounted("warning", kind, hints.count - len(hints.hints))


def add_limit(checked: CheckedSet, problems: Problems, *, recipe: Recipe) -> None:
    """An error where more rows are bad than `data.max_bad_fraction` lets training skip."""
    table = checked.table
    num_bad = table.count(NOT_A_ROW, NO_MEDIA, NOT_ENCODED)
    limit = allowed_bad(recipe.data.max_bad_fraction, len(table))
    if recipe.data.on_bad_sample == "skip" and num_bad > limit:
        problems.add(
            "error",
            f"{checked.name}: too many bad samples; got: {num_bad} of {len(table)}; "
            f"expected: at most {limit} (data.max_bad_fraction)",
        )


def add_duplicates(checked: CheckedSet, problems: Problems) -> int:
    """Warn of samples that repeat another one; return their number."""
    table = checked.table
    found = duplicates(table.digests)
    if found.num_repeated:
        first, again = (table.source(table.digest_rows[at]) for at in found.examples[0])
        problems.add(
            "warning",
            f"{checked.name}: {plural(found.num_repeated, 'sample repeats', 'samples repeat')} "
            f"another one word for word, with the same pictures; the first repeats "
            f"{first.file}:{first.line}",
            file=again.file,
            line=again.line,
        )
    return found.num_repeated


def evaluated_rows(checked: CheckedSet, num: int | None, *, seed: int) -> frozenset[int]:
    """The rows that are evaluated on during training, as training chooses them."""
    used = ~np.isin(np.frombuffer(checked.table.states, np.uint8), (NOT_A_ROW, NO_MEDIA))
    return frozenset(fixed_subset(np.flatnonzero(used).tolist(), num, seed=seed))


def _add_too_long(checked: CheckedSet, problems: Problems) -> None:
    """One warning for all that is left out for its length, as the recipe says."""
    too_long: list[Kept] = [
        kept for (state, _), kept in checked.table.failures.items() if state == TOO_LONG
    ]
    if too_long:
        error = too_long[0].failed[0].error
        problems.add(
            "warning",
            f"{checked.name}: {plural(sum(kept.count for kept in too_long), 'sample')} too long, "
            f"left out (data.over_length: drop); the first has {error.got}",
            file=error.file,
            line=error.line,
            kind=kind_of(f"{checked.name} samples too long, left out"),
        )


def errors_of_entries(
    entries: Sequence[DataEntry], recipe: Recipe, *, streamed: bool
) -> list[VlmtuneError]:
    """The errors of the entries that cannot be opened, each on its own."""
    errors = []
    for entry in entries:
        try:
            open_set([entry], recipe, streamed=streamed)
        except VlmtuneError as error:
            errors.append(error)
    return errors
