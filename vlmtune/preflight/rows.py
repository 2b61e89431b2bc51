"""Every row of a set: read, opened, measured, in parallel and in order.

rows -> chunks -> worker processes: parse -> media there -> Measurer -> digests -> outcomes
     -> this process, in the order of the rows: RowTable (table.py)
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmtune.data.dataset import OpenFile
from vlmtune.data.duplicates import Digests, PictureDigests, digests_of
from vlmtune.data.encode import Encoder, OverLength
from vlmtune.data.formats.rows import check_trainable
from vlmtune.data.measure import Measure, Measurer
from vlmtune.data.media import verify_image
from vlmtune.data.placed import placed
from vlmtune.data.source import check_located
from vlmtune.data.stream import Stream
from vlmtune.data.types import Conversation, Source
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.preflight.answers import odd_answers
from vlmtune.train.feed import Unread, is_lost_worker, start_worker, with_traceback

CHUNK = 64
ROWS_PER_WORKER = 400
"""A worker costs more to start than so many rows to check."""

Stage = Literal["row", "media", "encode"]


@dataclass(frozen=True)
class NumberedRow:
    """A row of an open file."""

    file: OpenFile
    index: int

    @property
    def source(self) -> Source:
        return self.file.rows.place(self.index)

    @property
    def id(self) -> str:
        return f"{self.file.label}:{self.source.line}"

    def conversation(self) -> Conversation:
        return self.file.conversation(self.index)


@dataclass(frozen=True)
class RowFailure:
    """Why a row cannot be used, and where on its way that was found. `is_too_long`: the recipe
    says to drop it."""

    stage: Stage
    error: SampleError
    is_too_long: bool = False


@dataclass(frozen=True)
class RowOutcome:
    """`id` is None where the row could not be parsed: it takes no id then. `odd`: (kind, message)
    of what is worth a warning."""

    id: str | None
    fallback_id: str
    source: Source
    measure: Measure | None = None
    failure: RowFailure | None = None
    digests: Digests | None = None
    odd: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RowSettings:
    """How rows are looked at. `encoder` is None where there is no processor to encode with: the
    pictures are then only decoded. `with_prompt`: the rows are answered as well (evaluation);
    `pair_prompt`: they are trained on in pairs."""

    encoder: Encoder | None
    max_image_pixels: int
    with_prompt: bool = False
    pair_prompt: str | None = None
    by_size: bool = True

    def exactly(self) -> RowSettings:
        """The same, with every sample encoded in full."""
        return replace(self, by_size=False)


@dataclass(frozen=True)
class ChunkOutcome:
    """`was_wrong`: blank pictures were found to give other numbers than the encoder."""

    rows: list[RowOutcome]
    was_wrong: bool


class RowChecker:
    """Looks at rows, one process's share; remembers pictures."""

    def __init__(self, settings: RowSettings) -> None:
        self._settings = settings
        self._digests = PictureDigests()
        self.measurer: Measurer | None = None
        if settings.encoder is not None:
            self.measurer = Measurer(settings.encoder, by_size=settings.by_size)

    def check(self, row: Unread) -> RowOutcome:
        """What becomes of a row."""
        try:
            conversation = row.conversation()
            if not self._settings.with_prompt:
                check_trainable(conversation)
        except SampleError as error:
            failure = RowFailure("row", error)
            return RowOutcome(None, row.id, row.source, failure=failure)
        outcome = RowOutcome(conversation.id, row.id, conversation.source)
        try:
            check_located(conversation)
        except SampleError as error:
            return replace(outcome, failure=RowFailure("media", error))
        try:
            measure = self._measure(conversation)
            digests = digests_of(conversation, self._digests)
        except SampleError as error:
            is_too_long = isinstance(error, OverLength)
            return replace(outcome, failure=RowFailure("encode", error, is_too_long))
        odd = tuple(odd_answers(conversation))
        return replace(outcome, measure=measure, digests=digests, odd=odd)

    def _measure(self, conversation: Conversation) -> Measure | None:
        if self.measurer is None:
            for image in conversation.images:
                try:
                    verify_image(image, max_pixels=self._settings.max_image_pixels)
                except VlmtuneError as error:
                    raise placed(error, conversation.source) from error
            return None
        pair_prompt = self._settings.pair_prompt
        if not self._settings.with_prompt:
            return self.measurer.measure(conversation, pair_prompt=pair_prompt)
        # Asked, with the loss of its answer, if any, and where pairs are trained on, of its pair.
        encoder = self._settings.encoder
        measure = None
        if encoder is not None and encoder.is_supervised(conversation):
            measure = self.measurer.measure(conversation)
        asked = self.measurer.measure_prompt(conversation)
        if pair_prompt is not None:
            self.measurer.measure(conversation, pair_prompt=pair_prompt)
        return measure or asked


class ChunkSet(IterableDataset[ChunkOutcome | VlmtuneError]):
    """The chunks of a set of rows; worker w of W does the chunks w, w + W, …, so that the loader,
    which asks the workers in turn, gives them in order. An error ends them and comes as a value,
    as in training (`train/feed.py`)."""

    def __init__(self, rows: Callable[[], Iterable[Unread]], settings: RowSettings) -> None:
        self._rows = rows
        self._settings = settings

    def __iter__(self) -> Iterator[ChunkOutcome | VlmtuneError]:
        try:
            yield from self._chunks()
        except VlmtuneError as error:
            yield with_traceback(error)

    def _chunks(self) -> Iterator[ChunkOutcome]:
        worker = get_worker_info()
        mine, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        checker = RowChecker(self._settings)
        rows = iter(self._rows())
        number = 0
        while chunk := list(islice(rows, CHUNK)):
            if number % num_workers == mine:
                outcomes = [checker.check(row) for row in chunk]
                measurer = checker.measurer
                yield ChunkOutcome(outcomes, bool(measurer and measurer.num_wrong))
            number += 1


@dataclass(frozen=True)
class FileRows:
    """The rows of open files, in order; `limit` of them from all over where it is given."""

    files: Sequence[OpenFile]
    limit: int | None = None

    @property
    def total(self) -> int:
        return sum(len(file.rows) for file in self.files)

    def __call__(self) -> Iterator[Unread]:
        ends = list(accumulate(len(file.rows) for file in self.files))
        total, wanted = self.total, len(self)
        for number in range(wanted):
            row = number * total // wanted
            at = bisect_right(ends, row)
            yield NumberedRow(self.files[at], row - (ends[at - 1] if at else 0))

    def __len__(self) -> int:
        return self.total if self.limit is None else min(self.total, self.limit)


@dataclass(frozen=True)
class StreamedRows:
    """Every row of a stream, read from front to back; the first `limit` where it is given."""

    stream: Stream
    limit: int | None = None

    def __call__(self) -> Iterator[Unread]:
        return islice(self.stream.every_row(), self.limit)


def check_rows(
    rows: Callable[[], Iterable[Unread]], settings: RowSettings, *, num_workers: int
) -> Iterator[RowOutcome]:
    """What becomes of each row, in order. `num_workers` 0: in this process.

    Raises Inexact where measuring by size turns out not to be exact, and VlmtuneError where a
    worker process died.
    """
    loader = DataLoader(
        ChunkSet(rows, settings),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(0),
    )
    try:
        for chunk in loader:
            if isinstance(chunk, VlmtuneError):
                raise chunk
            if chunk.was_wrong:
                raise Inexact
            yield from chunk.rows
    except RuntimeError as error:
        if not is_lost_worker(error):
            raise
        raise VlmtuneError(
            "a process that checks rows was ended from outside",
            got=str(error).splitlines()[0],
            do="memory may have run out: use fewer with --workers",
        ) from error


class Inexact(Exception):
    """Pictures of one size were given different numbers of tokens: ask again, without `by_size`."""


def useful_workers(num_rows: int, *, asked: int | None) -> int:
    """Processes for so many rows; 0: this one. As many as asked for, else as there are cores."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = min(cores or 1, num_rows // ROWS_PER_WORKER)
    return wanted if wanted > 1 else 0
