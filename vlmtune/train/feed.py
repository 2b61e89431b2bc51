"""Optimizer steps from conversations, by number or streamed, encoded ahead of the loop.

    step -> its samples, unread -> this process's share -> read -> encode -> micro-batches

With an embedding prompt a sample is encoded as a pair, its picture and its answer apart.

An item of the dataset is a whole optimizer step, a pure function of (seed, step, data): any number
of workers gives the same steps, and a resumed run starts at the step it needs. Rows that are read
from front to back are fed by `StreamDataset`.

Worker w of W makes the steps first + w, first + w + W, …: each reads every raw row on the way, and
parses, decodes and encodes those of its own steps and this process alone.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vlmtune.data.batches import BatchLayout, balanced_shares, make_batches, step_samples
from vlmtune.data.dataset import ConversationSet
from vlmtune.data.encode import Encoder, OverLength
from vlmtune.data.formats.base import check_trainable
from vlmtune.data.measure import WorkScale
from vlmtune.data.order import Order
from vlmtune.data.pairs import ImageTextPair, contrastive_batches, encode_pair
from vlmtune.data.stream import OpenStream, Stream, StreamCursor
from vlmtune.data.types import IGNORED, Batch, ContrastiveBatch, Conversation, Sample, Source
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.train.runtime import pinned

OPEN_FILES = 10_240
"""As many as macOS lets a process have."""

_TOO_MANY_FILES = re.compile(r"received \d+ items of ancdata\s*\Z|\AToo many open files\.")


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was not trained on. `is_bad`: it could not be used; otherwise it was too long
    and the recipe says to drop it."""

    id: str
    file: str
    line: int
    reason: str
    is_bad: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class StepBatch:
    """The micro-batches of one process for one optimizer step; at least one.

    `pair_keys` are, of contrastive training, the picture's and the text's key of each pair.
    `notes` are what was done to samples to fit them in (a note, and the sample's file
    and line: ids need not be unique).
    `num_step_samples` counts the samples of the step over all processes, left out or not;
    `positions` are, of these, the places of this process's; `epoch` is the share of training data
    seen after the step; `cursor`: where a stream stands after it.
    """

    micro_batches: Sequence[Batch | ContrastiveBatch]
    left_out: list[SkippedSample]
    notes: list[tuple[str, str, int]]
    num_step_samples: int
    positions: Sequence[int]
    epoch: float
    pair_keys: Sequence[tuple[int, int]] = ()
    cursor: StreamCursor | None = None

    def pin_memory(self) -> StepBatch:
        """The step with its micro-batches in pinned memory; the DataLoader calls it for CUDA."""
        return replace(self, micro_batches=[pinned(batch) for batch in self.micro_batches])


class LazySample(Protocol):
    """A sample not yet read. `id` and `source` name it where it cannot be."""

    @property
    def id(self) -> str: ...

    @property
    def source(self) -> Source: ...

    def conversation(self) -> Conversation:
        """Raises SampleError where it cannot be used."""


@dataclass(frozen=True)
class FeedSettings:
    """How steps are made of samples. `embedding_prompt`: what follows the pictures and the answer
    of a sample in contrastive training; None: answers are trained on."""

    batch_size: int
    layout: BatchLayout
    skip_bad_samples: bool
    drop_over_length: bool
    rank: int
    world_size: int
    work: WorkScale = WorkScale()
    embedding_prompt: str | None = None


@dataclass(frozen=True)
class StepBuilder:
    """Makes this process's part of a step; pickles into worker processes."""

    encoder: Encoder
    settings: FeedSettings

    def build(
        self, whole: Sequence[LazySample], *, epoch: float, cursor: StreamCursor | None = None
    ) -> StepBatch:
        """The step of the samples `whole`, of which only this process's share is read.

        Raises the first SampleError, unless such samples are left out.
        """
        s = self.settings
        read = [_read(unread) for unread in whole] if s.world_size > 1 else []
        share = self._share(read) if read else range(len(whole))
        samples: list[Sample | ImageTextPair] = []
        left_out: list[SkippedSample] = []
        for number in share:
            name, source = None, None
            try:
                conversation = _or_raise(read[number] if read else _read(whole[number]))
                name, source = conversation.id, conversation.source
                check_trainable(conversation)
                samples.append(self._encode(conversation))
            except SampleError as error:
                is_dropped = isinstance(error, OverLength) and s.drop_over_length
                if not (s.skip_bad_samples or is_dropped):
                    raise
                name, source = name or whole[number].id, source or whole[number].source
                left_out.append(
                    SkippedSample(name, source.file, source.line, str(error), is_bad=not is_dropped)
                )
        pairs = [x for x in samples if isinstance(x, ImageTextPair)]
        return StepBatch(
            micro_batches=self._pair_batches(pairs) if pairs else self._batches(samples),
            left_out=left_out,
            notes=[
                (note, sample.source.file, sample.source.line)
                for sample in samples
                for note in sample.notes
            ],
            num_step_samples=len(whole),
            positions=share,
            epoch=epoch,
            pair_keys=[(pair.picture_key, pair.text_key) for pair in pairs],
            cursor=cursor,
        )

    def _share(self, read: Sequence[Conversation | SampleError]) -> list[int]:
        """This process's samples, by number: the same split on every process that can read the
        same files. Where they cannot, the step finds out (`AsyncStepMetrics.check_shares`)."""
        s = self.settings
        work = [0.0 if isinstance(x, SampleError) else s.work.tokens(x) for x in read]
        return balanced_shares(work, s.world_size)[s.rank]

    def _encode(self, conversation: Conversation) -> Sample | ImageTextPair:
        prompt = self.settings.embedding_prompt
        if prompt is None:
            return self.encoder.encode(conversation)
        return encode_pair(self.encoder, conversation, prompt=prompt)

    def _pair_batches(self, pairs: Sequence[ImageTextPair]) -> list[ContrastiveBatch]:
        return contrastive_batches(pairs, layout=self.settings.layout)

    def _batches(
        self, encoded: Sequence[Sample | ImageTextPair]
    ) -> Sequence[Batch | ContrastiveBatch]:
        s = self.settings
        samples = [x for x in encoded if isinstance(x, Sample)] or [self._unsupervised()]
        batches = make_batches(samples, s.layout)
        if s.embedding_prompt is None:
            return batches
        # No pair is left: the row takes part in the gradient's reduction, with zeros.
        last = torch.tensor([samples[0].num_tokens - 1])
        return [ContrastiveBatch(batches[0].inputs, last, 1, (), ("",), 0, 0)]

    def _unsupervised(self) -> Sample:
        """A sample without a target: a process with nothing to train on still takes part in the
        gradient's reduction, with zeros."""
        ids = torch.full((2,), self.settings.layout.pad_token_id)
        return Sample(
            id="",
            source=Source("", 0),
            input_ids=ids,
            targets=torch.full_like(ids, IGNORED),
        )


def _read(unread: LazySample) -> Conversation | SampleError:
    try:
        return unread.conversation()
    except SampleError as error:
        return error


def _or_raise(read: Conversation | SampleError) -> Conversation:
    if isinstance(read, SampleError):
        raise read
    return read


@dataclass(frozen=True)
class _IndexedSample:
    """Sample `index` of a set."""

    conversations: Sequence[Conversation]
    index: int

    @property
    def id(self) -> str:
        if isinstance(self.conversations, ConversationSet):
            return f"{self.conversations.locate(self.index)[0].label}:{self.source.line}"
        return self.conversation().id

    @property
    def source(self) -> Source:
        if isinstance(self.conversations, ConversationSet):
            file, row = self.conversations.locate(self.index)
            return file.rows.place(row)
        return self.conversation().source

    def conversation(self) -> Conversation:
        return self.conversations[self.index]


class StepDataset(Dataset[StepBatch | VlmtuneError]):
    """Steps by number. `epochs`: where the stream of samples ends, so that the last step may be
    smaller; None: it goes on for as many steps as are asked for.

    An error of the data comes back as a value: raised in a worker, it would reach the loop as a
    traceback in a string.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        builder: StepBuilder,
        *,
        order: Order,
        epochs: float | None,
    ) -> None:
        self.conversations = conversations
        self.builder = builder
        self.order = order
        self.epochs = epochs

    def __getitem__(self, step: int) -> StepBatch | VlmtuneError:
        size = self.builder.settings.batch_size
        rows = step_samples(step, order=self.order, batch_size=size, epochs=self.epochs)
        epoch = ((step - 1) * size + len(rows)) / self.order.num_per_epoch
        try:
            return self.builder.build(
                [_IndexedSample(self.conversations, row) for row in rows], epoch=epoch
            )
        except VlmtuneError as error:
            return with_traceback(error)


def with_traceback(error: VlmtuneError) -> VlmtuneError:
    """`error`, to be handed on as a value; from a worker process its traceback, which does not
    pickle, goes along as a note, for `--debug`."""
    if get_worker_info() is not None:
        error.add_note(traceback.format_exc())
    return error


def start_worker(_: int) -> None:
    """Let the main process decide when a worker stops: Ctrl-C reaches the whole group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def is_lost_worker(error: RuntimeError) -> bool:
    """Whether torch says that a worker process is gone: killed, or over without an exception. One
    that a worker raises comes as `Caught … in DataLoader worker process …`, with its traceback."""
    return str(error).startswith("DataLoader worker (pid")


@contextmanager
def translate_worker_errors() -> Iterator[None]:
    """What torch raises, at any moment, where a process that makes steps ahead is gone, as a
    VlmtuneError."""
    try:
        yield
    except RuntimeError as error:
        if _TOO_MANY_FILES.search(str(error)):
            raise VlmtuneError(
                "too many files are open: each tensor of a step made ahead holds one",
                got=f"a limit of {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} (ulimit -n)",
                do="raise it, raise train.micro_batch_tokens, or set data.num_workers: 0",
            ) from error
        if not is_lost_worker(error):
            raise
        raise VlmtuneError(
            "a process that prepares steps was killed",
            got=str(error).splitlines()[0],
            do="memory may have run out: lower data.num_workers, and continue with --resume auto",
        ) from error


def steps_from(
    dataset: StepDataset, first: int, last: int, *, num_workers: int
) -> Iterator[StepBatch]:
    """The steps `first` to `last`, both included, in order. Raises the first `VlmtuneError`."""
    return load_steps(dataset, sampler=range(first, last + 1), num_workers=num_workers)


def _allow_many_files() -> None:
    """Raise the limit of open files to `OPEN_FILES`, or as far as it goes without special rights.

    Every tensor that comes from another process holds one open; a large step of many micro-batches
    has thousands, and the usual limit is 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def load_steps(
    dataset: Dataset[StepBatch | VlmtuneError], *, sampler: range | None, num_workers: int
) -> Iterator[StepBatch]:
    """The items of `dataset`, made ahead by `num_workers` processes; the same, in the same order,
    for any number of them."""
    if num_workers:
        _allow_many_files()
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        # The loader draws a base seed; without its own generator that would move the global RNG,
        # and a resumed run would see other dropout masks.
        generator=torch.Generator().manual_seed(0),
    )
    for item in loader:
        if isinstance(item, VlmtuneError):
            raise item
        yield item


class StreamDataset(IterableDataset[StepBatch | VlmtuneError]):
    """The steps `first` to `last`; `cursor` is where the stream stands before the first of them,
    None at its start.

    An error of the data comes back as a value: raised in a worker, it would reach the loop as a
    traceback in a string.
    """

    def __init__(
        self,
        stream: Stream,
        builder: StepBuilder,
        *,
        first: int,
        last: int,
        cursor: StreamCursor | None,
    ) -> None:
        self.stream = stream
        self.builder = builder
        self.steps = range(first, last + 1)
        self.cursor = cursor

    def __iter__(self) -> Iterator[StepBatch | VlmtuneError]:
        worker = get_worker_info()
        own, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        opened = OpenStream(self.stream, self.cursor)
        try:
            for number, _ in enumerate(self.steps):
                rows = [opened.take() for _ in range(self.builder.settings.batch_size)]
                if number % num_workers == own:
                    cursor = opened.cursor
                    yield self.builder.build(
                        rows, epoch=float(cursor.entries[0].epoch), cursor=cursor
                    )
        except VlmtuneError as error:
            yield with_traceback(error)


def stream_steps(
    stream: Stream,
    builder: StepBuilder,
    first: int,
    last: int,
    *,
    cursor: StreamCursor | None,
    num_workers: int,
) -> Iterator[StepBatch]:
    """The steps `first` to `last`, both included, in order. Raises the first `VlmtuneError`."""
    dataset = StreamDataset(stream, builder, first=first, last=last, cursor=cursor)
    return load_steps(dataset, sampler=None, num_workers=num_workers)
