"""The processes of `accelerate launch` or `torchrun` that share an evaluation; mostly just one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

Value = TypeVar("Value")

PATIENCE = timedelta(days=7)
"""How long a process waits for the slowest one, whose share may take hours longer."""


@dataclass(frozen=True)
class Processes:
    """This process's place among `world_size`. `device` is None where the loader chooses it."""

    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, mine: list[Any]) -> list[Any]:
        """Every process's list, one after the other, on every process. A collective."""
        if self.world_size == 1:
            return mine
        return list(gather_object(mine))

    def from_main(self, value: Value | None) -> Value:
        """The main process's value, on every process. A collective."""
        values = [value]
        if self.world_size > 1:
            broadcast_object_list(values)
        assert values[0] is not None
        return values[0]


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """Meet the other processes of a launch, and leave them on the way out, also on an error."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return

    # Asked for a GPU where there is none, accelerate leaves every process alone without a word.
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=use_cpu, timeout=PATIENCE)
    assert state.num_processes == int(os.environ["WORLD_SIZE"])
    try:
        yield Processes(state.process_index, state.num_processes, state.device)
    finally:
        state.destroy_process_group()
