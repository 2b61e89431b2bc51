"""Checkpoints written while training goes on: copied at the step, written by a thread.

    step -> copies of the tensors and the optimizer's state -> thread: write, sync, rename, prune
         -> training goes on; the next save, and the end, wait for the thread

The thread does what `save_checkpoint` does, so that a kill leaves complete checkpoints only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor

from vlmtune.train.checkpoint import Checkpoint, save_checkpoint
from vlmtune.train.transfer import Arrival, to_host

log = logging.getLogger("vlmtune")

COPY_FRACTION = 0.25
"""Of the host's free memory: a state that is larger is written without a copy, while training
waits."""


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with every tensor copied to the host: training on does not change it."""
    copies: dict[int, Tensor] = {}
    copy = replace(
        checkpoint,
        tensors=_copied(checkpoint.tensors, copies),
        optimizer=_copied(checkpoint.optimizer, copies),
    )
    if torch.cuda.is_available():
        Arrival(torch.device("cuda")).wait()
    return copy


def state_bytes(checkpoint: Checkpoint) -> int:
    """The size of a copy of the checkpoint's tensors."""
    found = _tensors([checkpoint.tensors, checkpoint.optimizer])
    return sum({id(t): t.nbytes for t in found}.values())


class CheckpointWriter:
    """Writes into `folder`, one checkpoint at a time, and keeps what `save_checkpoint` keeps.

    Used as a context manager: what is being written is finished before the block is left, also on
    an error. An error of the thread is raised by the next call, at the latest on leaving.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._has_said = False

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if value is None:
            self.wait()
        elif self._writing is not None and (error := self._writing.exception()) is not None:
            log.error("%s", error)

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write `checkpoint`, once the one before is there; its tensors may change after.

        Raises `VlmtuneError` where the disk refused the one before.
        """
        self.wait()
        size, free = state_bytes(checkpoint), psutil.virtual_memory().available
        if size > COPY_FRACTION * free:
            self._say_waiting(size, free)
            save_checkpoint(self._folder, checkpoint, keep=self._keep)
            return
        copy = copied(checkpoint)
        self._writing = self._thread.submit(save_checkpoint, self._folder, copy, keep=self._keep)

    def check(self) -> None:
        """Raise the `VlmtuneError` of a write that has failed; does not wait for one that goes
        on."""
        if self.is_idle():
            self.wait()

    def is_idle(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.done()

    def wait(self) -> None:
        """Return when everything is on the disk. Raises `VlmtuneError` where it refused."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _say_waiting(self, size: int, free: int) -> None:
        if not self._has_said:
            self._has_said = True
            log.info(
                "a checkpoint holds %.1f GB and %.1f GB of memory are free: training waits for "
                "each to be written",
                size / 1e9,
                free / 1e9,
            )


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """A tensor that occurs twice (the optimizer's tables) is copied once."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = to_host(value)
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: _copied(item, copies) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, copies) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
