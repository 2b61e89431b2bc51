"""What is trained, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn

from vlmtune.errors import VlmtuneError
from vlmtune.models.adapters.base import Adapter
from vlmtune.models.vision import VisionFeatures
from vlmtune.train.checkpoint import (
    Checkpoint,
    CheckpointMeta,
    CheckpointWriter,
    random_state,
    restore_random_state,
)
from vlmtune.train.feed import StepBatch

OBJECTIVE = "objective."
"""How the names of the objective's tensors start in a checkpoint."""


class Objective(Protocol):
    """What is minimised. `unit` names its terms in the logs; `tensors` are what it learns itself,
    beside the model, by name: they are kept in checkpoints and updated alike on every process."""

    @property
    def unit(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, nn.Parameter]: ...

    def num_terms(self, data: StepBatch) -> int:
        """Terms of the loss in this process's share of a step."""

    def weight(self, data: StepBatch) -> float:
        """Their weights' sum; their number where each counts 1."""

    def backward(
        self,
        forward: nn.Module,
        data: StepBatch,
        accelerator: Accelerator,
        weight: float | Tensor,
    ) -> Tensor:
        """Accumulate the gradient of the step's loss, whose terms weigh `weight` over all
        processes (1 where nothing weighs; on the device where nothing is to wait for it); the
        weighted terms' sum of each micro-batch, (num micro-batches,). May be a collective."""

    def log(self) -> dict[str, float]:
        """Figures of the last step besides the loss."""


@dataclass
class TrainState:
    """What is trained, and by what. `parameters` are the trained tensors by name; `features` makes
    those of pictures where the vision tower is frozen."""

    forward: nn.Module
    adapter: Adapter
    parameters: Mapping[str, nn.Parameter]
    part_of_name: Mapping[str, str]
    optimizer: AcceleratedOptimizer
    objective: Objective
    features: VisionFeatures | None = None

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors, and what the objective learns besides them."""
        own = {OBJECTIVE + name: p.detach() for name, p in self.objective.tensors.items()}
        return self.adapter.state_dict() | own

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.objective.tensors.items():
                parameter.copy_(state[OBJECTIVE + name])
        adapter = {name: t for name, t in state.items() if not name.startswith(OBJECTIVE)}
        self.adapter.load_state_dict(adapter)


def save(
    state: TrainState, meta: CheckpointMeta, accelerator: Accelerator, writer: CheckpointWriter
) -> None:
    """Begin to write a checkpoint of `state` at `meta`; the main process does. A collective,
    after which no process may read the checkpoint yet: `writer` knows when it is there."""
    rng = gather_object([random_state()])
    if accelerator.is_main_process:
        optimizer: dict[str, Any] = {"optimizer": state.optimizer.state_dict()}
        if accelerator.scaler is not None:
            optimizer["scaler"] = accelerator.scaler.state_dict()
        writer.save(Checkpoint(meta, state.state_dict(), optimizer, rng))


def restore(state: TrainState, checkpoint: Checkpoint, accelerator: Accelerator) -> None:
    """Put a checkpoint's tensors, optimizer and random state in place. Raises `VlmtuneError` where
    they are of other modules or another number of processes."""
    if len(checkpoint.rng) != accelerator.num_processes:
        raise VlmtuneError(
            "cannot resume on another number of processes",
            got=accelerator.num_processes,
            expected=len(checkpoint.rng),
            do="launch as before, or start over with --resume never",
        )
    state.load_state_dict(checkpoint.tensors)
    state.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(checkpoint.optimizer["scaler"])
    restore_random_state(checkpoint.rng[accelerator.process_index])
