"""One set of the recipe, from its entries to what is wrong with it.

entries -> files (or a stream) -> check_rows -> RowTable -> problems, by the rules of the feed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlmtune.data.dataset import SCANNED_OUTRIGHT, OpenFile, open_files
from vlmtune.data.duplicates import duplicates
from vlmtune.data.source import NEW_IDS, access_of, cache_dir_of
from vlmtune.data.stream import Stream, open_stream
from vlmtune.data.text import shorten
from vlmtune.errors import SampleError, VlmtuneError, plural
from vlmtune.evaluation.subset import fixed_subset
from vlmtune.preflight.problems import Problems, Severity, kind_of
from vlmtune.preflight.rows import (
    FileRows,
    Inexact,
    RowSettings,
    StreamedRows,
    check_rows,
    useful_workers,
)
from vlmtune.preflight.table import (
    NO_MEDIA,
    NOT_A_ROW,
    NOT_ENCODED,
    TOO_LONG,
    Failed,
    Kept,
    RowTable,
)
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.schema import Recipe
from vlmtune.train.feed import Unread
from vlmtune.train.skips import allowed_bad

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


def open_set(entries: Sequence[DataEntry], recipe: Recipe, *, streamed: bool) -> FileRows | Stream:
    """The files of some entries, or their stream. Raises VlmtuneError as training does."""
    access = access_of(recipe.data)
    cache_dir = cache_dir_of(access)
    if streamed:
        return open_stream(
            entries,
            seed=recipe.seed,
            block_rows=recipe.data.shuffle_buffer,
            access=access,
            cache_dir=cache_dir,
        )
    return FileRows(open_files(entries, access=access, cache_dir=cache_dir))


def look_at(
    name: SetName,
    opened: FileRows | Stream,
    settings: RowSettings,
    *,
    num_workers: int | None,
    max_samples: int | None,
    show_progress: ShowProgress,
) -> CheckedSet:
    """Look at every row of a set, or at `max_samples` of them. Raises VlmtuneError where a file
    cannot be read on."""
    rows: Callable[[], Iterable[Unread]]
    if isinstance(opened, Stream):
        rows, num_rows = StreamedRows(opened, max_samples), 0
        workers = useful_workers(SCANNED_OUTRIGHT, asked=num_workers)
    else:
        rows = FileRows(opened.files, max_samples)
        num_rows = rows.total
        workers = useful_workers(len(rows), asked=num_workers)
    while True:
        table = RowTable()
        expected = 0 if isinstance(rows, StreamedRows) else len(rows)
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
    files = [] if isinstance(opened, Stream) else list(opened.files)
    return CheckedSet(name, files, table, num_rows or len(table), settings.by_size)


def look_at_repeated_ids(checked: CheckedSet, problems: Problems) -> None:
    """Of held-out rows with one id the first is used; training uses all, which is said."""
    table = checked.table
    taken = list(table.repeated_ids())
    if not taken or not checked.files or checked.is_partial:
        return
    if checked.name == "data.train":
        (number, first), *_ = taken
        source, other = table.source(number), table.source(first)
        problems.add(
            "warning",
            f"{checked.name}: {plural(len(taken), 'row')} with the id of a row before, trained on "
            f"as well; the first has that of {other.file}:{other.line}",
            file=source.file,
            line=source.line,
        )
        return
    rows = FileRows(checked.files)
    ids = _ids_at(rows, {number for number, _ in taken})
    for number, first in taken:
        source, other = table.source(number), table.source(first)
        error = SampleError(
            f"the id {shorten(ids[number], 60)!r} is taken",
            file=source.file,
            line=source.line,
            got=f"the same id at {other.file}:{other.line}",
            expected="an id of its own",
            do=NEW_IDS,
        )
        label = next(f.label for f in checked.files if f.rows.file == source.file)
        table.take_out(Failed(number, f"{label}:{source.line}", source, NOT_A_ROW, error))


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
    """A warning where samples are there more than once; how many are."""
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


def _ids_at(rows: FileRows, numbers: set[int]) -> dict[int, str]:
    """The ids of some rows of a set, read again: the table has their digests."""
    return {number: row.conversation().id for number, row in enumerate(rows()) if number in numbers}


def opened_one_by_one(
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
