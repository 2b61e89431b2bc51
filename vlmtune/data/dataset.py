"""Reads data files as conversations: by number, all at once before a model loads, or row by row.

    entries -> open_files -> sources of rows, the format told from the first rows
      -> iter_rows: every row in order, not yet parsed
           -> scan of every row, up to a size -> ConversationSet: number -> row -> Conversation
           -> `vlmtune check` and `vlmtune data`, each with what it does to a row

A row that the scan finds bad is not part of the set. A larger set is not scanned: its bad rows stay
in the set and raise when they are read.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, overload

from vlmtune.data.formats.base import Row, check_trainable
from vlmtune.data.formats.registry import (
    find_format,
    first_rows,
    parse_row,
    unused_keys,
)
from vlmtune.data.media import locate_media
from vlmtune.data.order import Order, num_slots
from vlmtune.data.sources.base import Rows
from vlmtune.data.sources.registry import digests_of, open_rows
from vlmtune.data.types import LOCAL, Conversation, Media, MediaPolicy, Skipped, Source
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError, at, plural, shorten
from vlmtune.files import short_digest
from vlmtune.recipe.data_section import DataEntry, DataSection, FormatName

logger = logging.getLogger("vlmtune")

SCANNED_OUTRIGHT = 100_000
"""Sets of at most this many rows are parsed completely before anything else happens."""

OnBadSample = Literal["error", "skip"]


@dataclass(frozen=True)
class OpenFile:
    """A file of an entry, and how its rows become conversations. `label`: what the ids of rows
    without one start with."""

    entry: DataEntry
    rows: Rows
    format: FormatName
    label: str
    media_policy: MediaPolicy

    def conversation(self, index: int) -> Conversation:
        """Row `index` (0-based). Raises SampleError with its place where it cannot be used."""
        return parse_row(self.row(index), self.format)

    def fallback_id(self, source: Source) -> str:
        """What a row is called that has no id."""
        return f"{self.label}:{source.line}"

    def row(self, index: int) -> Row:
        return self.as_row(self.rows[index], self.rows.place(index))

    def as_row(self, values: Mapping[str, Any], source: Source) -> Row:
        """The row that is read as `values`, with what the recipe says of the file."""
        base_dir = self.rows.base_dir if self.entry.image_dir is None else self.entry.image_dir
        return Row(
            values=dict(values),
            source=source,
            base_dir=Path(base_dir),
            fallback_id=self.fallback_id(source),
            entry=self.entry,
            media_policy=self.media_policy,
        )


@dataclass(frozen=True)
class DataRow:
    """Row `number` of all files (0-based), which is row `index` of `file`; not yet read."""

    number: int
    file: OpenFile
    index: int
    unused: Counter[str] | None = None

    @property
    def source(self) -> Source:
        return self.file.rows.place(self.index)

    @property
    def id(self) -> str:
        """What it is called where it has no id, or cannot be read."""
        return self.file.fallback_id(self.source)

    def conversation(self) -> Conversation:
        """Raises SampleError with its place where it cannot be used."""
        row = self.file.row(self.index)
        if self.unused is not None:
            self.unused.update(unused_keys(row.values, self.file.entry, self.file.format))
        return parse_row(row, self.file.format)


def iter_rows(
    files: Sequence[OpenFile],
    numbers: Iterable[int] | None = None,
    *,
    unused: Counter[str] | None = None,
) -> Iterator[DataRow]:
    """The rows of `files` in order: all, or those with `numbers` (0-based, over all files), which
    rise. `unused` counts the keys of the rows that are read from which no conversation is made."""
    at = before = 0
    for number in range(num_rows(files)) if numbers is None else numbers:
        while number >= before + len(files[at].rows):
            before += len(files[at].rows)
            at += 1
        yield DataRow(number, files[at], number - before, unused)


def num_rows(files: Sequence[OpenFile]) -> int:
    return sum(len(file.rows) for file in files)


@dataclass(frozen=True)
class ConversationSet(Sequence[Conversation]):
    """Rows of `files`, numbered through; `kept` are, per file, the rows that are part of it, or
    None for all. Holds no conversation."""

    files: tuple[OpenFile, ...]
    kept: tuple[Sequence[int] | None, ...]
    _ends: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = [self._count(at) for at in range(len(self.files))]
        object.__setattr__(self, "_ends", list(accumulate(counts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        file, row = self.locate(index)
        return file.conversation(row)

    def locate(self, index: int) -> tuple[OpenFile, int]:
        """The file and the row in it (0-based) of sample `index`. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = bisect_right(self._ends, index)
        row = index - (self._ends[at - 1] if at else 0)
        kept = self.kept[at]
        return self.files[at], row if kept is None else int(kept[row])

    def counts_and_weights(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Samples and weight of each entry that has any, for `order.Order`."""
        used = self._entries()
        return tuple(count for _, count in used), tuple(entry.weight for entry, _ in used)

    def order(self, *, seed: int) -> Order:
        """The order of the training stream. Raises VlmtuneError where there is no sample, or where
        an entry's weight leaves none of its samples in an epoch."""
        if not len(self):
            raise VlmtuneError(
                "data.train: no sample is left to train on",
                got=f"{plural(num_rows(self.files), 'row')}, none of which can be used",
            )
        for entry, count in self._entries():
            if num_slots(count, entry.weight) == 0:
                raise VlmtuneError(
                    "data.train: the weight gives an epoch without samples",
                    got=f"{entry.path}: {plural(count, 'sample')} of weight {entry.weight:g}",
                    do="raise the weight, or remove the entry",
                )
        return Order(seed, *self.counts_and_weights())

    def _entries(self) -> list[tuple[DataEntry, int]]:
        """The entries that have samples, and how many each has."""
        counts: dict[int, int] = {}
        entries: dict[int, DataEntry] = {}
        for index, file in enumerate(self.files):
            counts[id(file.entry)] = counts.get(id(file.entry), 0) + self._count(index)
            entries[id(file.entry)] = file.entry
        return [(entries[key], count) for key, count in counts.items() if count]

    def _count(self, at: int) -> int:
        kept = self.kept[at]
        return len(self.files[at].rows) if kept is None else len(kept)


def open_files(
    entries: Sequence[DataEntry], *, media_policy: MediaPolicy = LOCAL, cache_dir: Path
) -> list[OpenFile]:
    """Every file of `entries`, with its format. Raises VlmtuneError for one that is missing,
    empty, listed twice or in no known format."""
    opened = [(entry, rows) for entry in entries for rows in open_rows(entry, cache_dir=cache_dir)]
    labels = labels_of([rows for _, rows in opened])
    files = []
    for (entry, rows), label in zip(opened, labels):
        if len(rows) == 0:
            raise VlmtuneError("there is no sample in the file", file=rows.file)
        name, line = find_format(first_rows(rows), entry, file=rows.file)
        logger.info("%s: %s, format %s", rows.file, plural(len(rows), "row"), line)
        files.append(OpenFile(entry, rows, name, label, media_policy))
    return files


def labels_of(files: Sequence[Rows]) -> list[str]:
    """What the ids of rows without one start with: the file's name without its ending, or the
    whole where several have it. Raises VlmtuneError where a file is listed twice."""
    seen = set()
    for rows in files:
        place = Path(rows.file).resolve()
        if place in seen:
            raise VlmtuneError("the data file is listed twice", file=rows.file, expected="once")
        seen.add(place)
    stems = [Path(rows.file.removesuffix(".gz")).stem for rows in files]
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else rows.file for rows, stem in zip(files, stems)]


Files = Sequence[str | Path | DataEntry]


def load_conversations(
    files: Files,
    *,
    on_bad_sample: OnBadSample = "error",
    check_media: bool = True,
    media_policy: MediaPolicy = LOCAL,
) -> tuple[list[Conversation], list[Skipped]]:
    """All conversations of `files`, in order and in memory, and with `skip` the rows that cannot
    be used. For evaluation; training asks `open_conversations`.

    With `error`, raises an ErrorGroup of every bad row (the first 20 in full, the rest counted). A
    file that cannot be read, or a broken JSON array, is an error either way. `check_media` looks
    for every picture file; none is decoded here.
    """
    conversations: list[Conversation] = []
    opened = _open(files, media_policy)
    _, skipped = _scan(opened, on_bad_sample, check_media=check_media, into=conversations)
    return conversations, skipped


def open_conversations(
    files: Files, *, on_bad_sample: OnBadSample, media_policy: MediaPolicy = LOCAL
) -> tuple[ConversationSet, list[Skipped]]:
    """The samples of `files` by number, and with `skip` the rows that are not among them.

    A set of up to `SCANNED_OUTRIGHT` rows is checked as `load_conversations` does; of a larger one
    a bad row raises when it is read, and a log line says so.
    """
    opened = _open(files, media_policy)
    if num_rows(opened) > SCANNED_OUTRIGHT:
        logger.info(
            "%s rows are checked when training reaches them; `vlmtune check` checks all in advance",
            f"{num_rows(opened):,}",
        )
        return ConversationSet(tuple(opened), (None,) * len(opened)), []
    kept, skipped = _scan(opened, on_bad_sample, check_media=True, into=None)
    return ConversationSet(tuple(opened), tuple(kept)), skipped


def media_policy_of(section: DataSection) -> MediaPolicy:
    """Where the recipe allows pictures and videos to be read from."""
    return MediaPolicy(
        allow_outside_paths=section.allow_outside_paths,
        allow_urls=section.allow_urls,
        allow_private_addresses=section.allow_private_addresses,
        max_download_bytes=section.max_download_bytes,
        url_timeout_seconds=section.url_timeout_seconds,
        cache_dir=None if section.cache_dir is None else Path(section.cache_dir),
    )


def all_rows(files: Files, *, media_policy: MediaPolicy = LOCAL) -> ConversationSet:
    """Every row of `files` by number, unchecked: a bad one raises SampleError when asked for."""
    opened = _open(files, media_policy)
    return ConversationSet(tuple(opened), (None,) * len(opened))


def _open(files: Files, media_policy: MediaPolicy) -> list[OpenFile]:
    return open_files(
        as_entries(files), media_policy=media_policy, cache_dir=media_policy.cache_folder
    )


def as_entries(files: Files) -> list[DataEntry]:
    """Paths as entries without further keys."""
    return [file if isinstance(file, DataEntry) else DataEntry(path=str(file)) for file in files]


def cache_dir_of(media_policy: MediaPolicy) -> Path:
    """Where indexes and downloads are kept: the recipe's `data.cache_dir`, or the user's cache."""
    return media_policy.cache_folder


def content_hash(files: Files, *, cache_dir: Path | None = None) -> dict[str, str]:
    """A digest of each file, shard, folder or data set, as a run folder records it."""
    folder = cache_dir or cache_dir_of(LOCAL)
    return {
        path: digest
        for entry in as_entries(files)
        for path, digest in digests_of(entry, cache_dir=folder).items()
    }


def _scan(
    files: Sequence[OpenFile],
    on_bad_sample: OnBadSample,
    *,
    check_media: bool,
    into: list[Conversation] | None,
) -> tuple[list[list[int]], list[Skipped]]:
    """The good rows of each file and, with `skip`, the bad ones; raises an ErrorGroup otherwise."""
    kept: list[list[int]] = []
    bad = BadRows()
    skipped: list[Skipped] = []
    places: dict[str, Source] = {}
    for file in files:
        unused: Counter[str] = Counter()
        kept.append([])
        for row in iter_rows([file], unused=unused):
            try:
                conversation = row.conversation()
                if into is None:
                    check_trainable(conversation)
                else:  # answers are told apart by id; training goes by place
                    _check_id(conversation, places)
                if check_media:
                    check_located(conversation)
            except SampleError as error:
                bad.add(error)
                skipped.append(Skipped(row.id, row.source, str(error)))
                continue
            kept[-1].append(row.index)
            if into is not None:
                into.append(conversation)
        if unused:
            names = ", ".join(f"{key} ({count})" for key, count in sorted(unused.items()))
            logger.info("%s: unused keys, with their number of rows: %s", file.rows.file, names)
    if bad.count and on_bad_sample == "error":
        raise bad.as_error()
    return kept, skipped


def check_located(conversation: Conversation) -> None:
    """Look for every picture and video. Raises SampleError with the row's place."""
    everything: tuple[Media, ...] = (*conversation.images, *conversation.videos)
    for media in everything:
        with at(conversation.source):
            locate_media(media)


def _check_id(conversation: Conversation, places: dict[str, Source]) -> None:
    first = places.setdefault(conversation.id, conversation.source)
    if first is not conversation.source:
        raise repeated_id(conversation.id, conversation.source, f"at {first.file}:{first.line}")


def repeated_id(name: str, source: Source, where: str) -> SampleError:
    """The error of the row at `source` whose id another row has, the one that `where` names."""
    return SampleError(
        f"the id {shorten(name, 60)!r} is used twice",
        at=source,
        got=f"the same id {where}",
        expected="a unique id",
        do="change it, or remove the ids; `vlmtune data convert --new-ids` makes new ones",
    )


MAX_NAMED = 20
"""Bad rows that a message names; the others are counted."""


@dataclass
class BadRows:
    """The rows that cannot be used: their number, and the errors of the first."""

    count: int = 0
    errors: list[VlmtuneError] = field(default_factory=list)

    def add(self, error: SampleError) -> None:
        self.count += 1
        if len(self.errors) < MAX_NAMED:
            self.errors.append(error)

    @property
    def named(self) -> list[str]:
        return [str(error) for error in self.errors]

    def as_error(self) -> ErrorGroup:
        """All of them as one error: the first in full, the rest counted."""
        left = self.count - len(self.errors)
        more = [VlmtuneError(f"and {plural(left, 'more bad row')}")] if left else []
        return ErrorGroup([*self.errors, *more])


@dataclass
class UniqueIds:
    """Reads conversations from rows, and refuses the id of a row that was used before.

    `new_ids`: each id is replaced by the name of the file and the line. Ids are compared by 8-byte
    digests: a million take some 70 MB at most.
    """

    new_ids: bool = False
    _taken: set[int] = field(default_factory=set, repr=False)

    def conversation(self, row: DataRow) -> Conversation:
        """Raises SampleError where the row cannot be used, or its id is taken."""
        conversation = row.conversation()
        if self.new_ids:
            conversation = replace(conversation, id=row.id)
        if short_digest(conversation.id) in self._taken:
            raise repeated_id(conversation.id, conversation.source, "in an earlier row")
        return conversation

    def take(self, name: str) -> None:
        """Note the id of a row that is used."""
        self._taken.add(short_digest(name))
