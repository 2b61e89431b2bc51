"""Reads, opens and measures every row of a set, in parallel and in order.

Odd answers are hints, not proofs, and only ever warnings. An answer counts as leaking if all of it,
at least four characters or two words, appears word for word in the user's turn before it, and the
question does not offer it as a choice.

rows -> chunks -> worker processes: parse -> media there -> Measurer -> digests -> outcomes
     -> this process, in the order of the rows: RowTable (sets.py)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmtune.data.dataset import check_located
from vlmtune.data.encode import Encoder, OverLength
from vlmtune.data.formats.base import check_trainable
from vlmtune.data.measure import Measure, Measurer
from vlmtune.data.media import verify_image
from vlmtune.data.tools.duplicates import Digests, PictureDigests, sample_digests
from vlmtune.data.types import Conversation, Source
from vlmtune.errors import SampleError, VlmtuneError, at, shorten
from vlmtune.train.feed import LazySample, is_lost_worker, start_worker, with_traceback

LEAK = "the answer appears in its question"
NO_WORDS = "the answer has no letter and no digit"
EMPTY_CELL = "the answer is the text of an empty table cell"

MIN_CHARACTERS = 4
_EMPTY_CELLS = frozenset({"nan", "null", "<na>", "#n/a"})
_EDGES = " \t\r\n.,;:!?\"'()[]"
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_CHOICE_WORD = re.compile(r"\b(?:or|either|true|false|yes|no)\b", re.IGNORECASE)
_BULLET = re.compile(r"\s*(?:[-*•]|\(?[A-Za-z0-9]{1,2}[.):])?\s*")
_SEPARATED = re.compile(r"[,;]")
_ENUMERATED = re.compile(r"(?:^|\n|\s)\(?[A-Za-z1-9][.)]\s")


def odd_answers(conversation: Conversation) -> list[tuple[str, str]]:
    """(kind, message) for each supervised answer that teaches nothing."""
    found = []
    question = ""
    for number, turn in enumerate(conversation.turns, start=1):
        if turn.role == "user":
            question = turn.text
        if turn.role != "assistant" or turn.weight == 0:
            continue
        answer = turn.text.strip()
        if not any(character.isalnum() for character in answer):
            found.append((NO_WORDS, f"turn {number}: {NO_WORDS}; got: {shorten(answer, 40)!r}"))
        elif answer.lower() in _EMPTY_CELLS:
            found.append((EMPTY_CELL, f"turn {number}: {EMPTY_CELL}; got: {answer!r}"))
        elif not conversation.options and leaks(answer, question):
            got = f"{shorten(answer, 40)!r} in {shorten(question, 100)!r}"
            found.append((LEAK, f"turn {number}: {LEAK}; got: {got}"))
    return found


def leaks(answer: str, question: str) -> bool:
    """Whether `answer` is given away by `question`: see the module's first words."""
    words = answer.strip(_EDGES)
    if len(words) < MIN_CHARACTERS and len(words.split()) < 2:
        return False
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    whole = re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE)
    places = list(whole.finditer(question))
    return bool(places) and not any(_is_offered(question, place) for place in places)


def _is_offered(question: str, place: re.Match[str]) -> bool:
    """Whether the words at `place` are one of several that the question offers."""
    if len(_ENUMERATED.findall(question)) > 1:
        return True
    around = [s for s in _SENTENCE.finditer(question) if s.start() <= place.start() < s.end()]
    if any(_CHOICE_WORD.search(sentence.group()) for sentence in around):
        return True
    before, after = question[: place.start()], question[place.end() :]
    line_before, line_after = before.rpartition("\n")[2], after.partition("\n")[0]
    is_own_line = _BULLET.fullmatch(line_before) and not line_after.strip(_EDGES)
    if is_own_line and question.strip().count("\n") > 1:
        return True
    beside = before.rstrip()[-1:] + after.lstrip()[:1]
    if set(beside) & set("/|"):
        return True
    return bool(set(beside) & set(",;")) and len(_SEPARATED.findall(question)) > 1


CHUNK = 64
ROWS_PER_WORKER = 400
"""Starting a worker takes longer than checking this many rows."""

Stage = Literal["row", "media", "encode"]


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

    def check(self, row: LazySample) -> RowOutcome:
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
            digests = sample_digests(conversation, self._digests)
        except SampleError as error:
            is_too_long = isinstance(error, OverLength)
            return replace(outcome, failure=RowFailure("encode", error, is_too_long))
        odd = tuple(odd_answers(conversation))
        return replace(outcome, measure=measure, digests=digests, odd=odd)

    def _measure(self, conversation: Conversation) -> Measure | None:
        if self.measurer is None:
            for image in conversation.images:
                with at(conversation.source):
                    verify_image(image, max_pixels=self._settings.max_image_pixels)
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

    def __init__(self, rows: Callable[[], Iterable[LazySample]], settings: RowSettings) -> None:
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


def check_rows(
    rows: Callable[[], Iterable[LazySample]], settings: RowSettings, *, num_workers: int
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
            "a process that checks rows was killed",
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
