"""What is trained, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn

from vlmtune.errors import VlmtuneError
from vlmtune.models.vision import VisionFeatures
from vlmtune.train.checkpoint import (
    Checkpoint,
    CheckpointMeta,
    CheckpointWriter,
    random_state,
    restore_random_state,
)
from vlmtune.train.step import Method, Objective

OBJECTIVE = "objective."
"""How the names of the objective's tensors start in a checkpoint."""


class TrainedMethod(Method, Protocol):
    """An adapter method, as the loop needs it: the step's part and its state."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def save(self, folder: Path) -> None: ...


@dataclass
class TrainState:
    """What is trained, and by what. `parameters` are the trained tensors by name; `features` makes
    those of pictures where the vision tower is frozen."""

    forward: nn.Module
    method: TrainedMethod
    parameters: Mapping[str, nn.Parameter]
    part_of_name: Mapping[str, str]
    optimizer: AcceleratedOptimizer
    objective: Objective
    features: VisionFeatures | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """The method's tensors, and what the objective learns beside them."""
        own = {OBJECTIVE + name: p.detach() for name, p in self.objective.tensors.items()}
        return self.method.state_dict() | own

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.objective.tensors.items():
                parameter.copy_(state[OBJECTIVE + name])
        method = {name: t for name, t in state.items() if not name.startswith(OBJECTIVE)}
        self.method.load_state_dict(method)


def save(
    trainee: TrainState, state: CheckpointMeta, accelerator: Accelerator, writer: CheckpointWriter
) -> None:
    """Begin to write a checkpoint of `trainee` at `state`; the main process does. A collective,
    after which no process may read the checkpoint yet: `writer` knows when it is there."""
    rng = gather_object([random_state()])
    if accelerator.is_main_process:
        optimizer: dict[str, Any] = {"optimizer": trainee.optimizer.state_dict()}
        if accelerator.scaler is not None:
            optimizer["scaler"] = accelerator.scaler.state_dict()
        writer.save(Checkpoint(state, trainee.state_dict(), optimizer, rng))


def restore(trainee: TrainState, checkpoint: Checkpoint, accelerator: Accelerator) -> None:
    """Put a checkpoint's tensors, optimizer and random state in place. Raises `VlmtuneError` where
    they are of other modules or another number of processes."""
    if len(checkpoint.rng) != accelerator.num_processes:
        raise VlmtuneError(
            "cannot resume on another number of processes",
            got=accelerator.num_processes,
            expected=len(checkpoint.rng),
            do="launch as before, or start over with --resume never",
        )
    trainee.load_state_dict(checkpoint.tensors)
    trainee.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(checkpoint.optimizer["scaler"])
    restore_random_state(checkpoint.rng[accelerator.process_index])
