"""Optimizer steps from a stream of rows, encoded ahead of the loop.

Worker w of W makes the steps first + w, first + w + W, …: each reads every raw row on the way, and
parses, decodes and encodes those of its own steps and this process alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from vlmtune.data.stream import OpenStream, Stream, StreamCursor
from vlmtune.errors import VlmtuneError
from vlmtune.train.feed import StepBuilder, StepData, loaded, with_traceback


class StreamDataset(IterableDataset[StepData | VlmtuneError]):
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

    def __iter__(self) -> Iterator[StepData | VlmtuneError]:
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
) -> Iterator[StepData]:
    """The steps `first` to `last`, both included, in order. Raises the first `VlmtuneError`."""
    dataset = StreamDataset(stream, builder, first=first, last=last, cursor=cursor)
    return loaded(dataset, sampler=None, num_workers=num_workers)
