"""One optimizer step: token-exact over micro-batches and processes.

    loss of the step = (sum of its weighted terms over all processes and micro-batches)
                       / (sum of their weights over all processes)

A term is a supervised token's cross-entropy (`NextToken`), weighted as its turn is, or a pair's of
weight 1 (`contrastive.py`). However the step's samples are split, the gradient is that of this one
quotient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn

from vlmtune.data.types import Batch, SideBatch
from vlmtune.errors import VlmtuneError
from vlmtune.models.loss import total_weight
from vlmtune.train.feed import StepData, to_device


class Method(Protocol):
    """What the step needs of an adapter method."""

    def penalty(self) -> Tensor | None: ...

    def after_step(self, step: int) -> dict[str, object]: ...


class Objective(Protocol):
    """What is minimised. `unit` names its terms in the logs; `tensors` are what it learns itself,
    beside the model, by name: they are kept in checkpoints and updated alike on every process."""

    @property
    def unit(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, nn.Parameter]: ...

    def num_terms(self, data: StepData) -> int:
        """Terms of the loss in this process's share of a step."""

    def weight(self, data: StepData) -> float:
        """Their weights' sum; their number where each counts 1."""

    def backward(
        self, forward: nn.Module, data: StepData, accelerator: Accelerator, weight: float
    ) -> Tensor:
        """Accumulate the gradient of the step's loss, whose terms weigh `weight` over all
        processes; the weighted terms' sum of each micro-batch, (num micro-batches,). May be a
        collective."""

    def log(self) -> dict[str, float]:
        """Figures of the last step besides the loss."""


@dataclass
class StepResult:
    """What a step did. `loss` is nats per term, over all processes, each counting by its weight;
    `weight` is that of all; `was_skipped`: fp16's loss scaler threw the step away; `stop`: some
    process was asked to stop."""

    loss: float
    penalty: float | None
    grad_norm: float
    num_terms: int
    weight: float
    num_left_out: int
    was_skipped: bool
    stop: bool
    part_grad_norms: dict[str, float] = field(default_factory=dict)
    method_log: dict[str, object] = field(default_factory=dict)


def train_step(
    forward: nn.Module,
    *,
    step: int,
    data: StepData,
    objective: Objective,
    method: Method,
    parameters: Mapping[str, nn.Parameter],
    part_of_name: Mapping[str, str],
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
    max_grad_norm: float | None,
    stop_requested: bool = False,
    log_parts: bool = False,
) -> StepResult:
    """Forward and backward over this process's `data`, then update. Contains two collectives
    (counts, losses) besides DDP's and the objective's own.

    Raises `VlmtuneError` on all processes, before the update, when the loss or the gradient is not
    finite on any of them.
    """
    device = accelerator.device
    local = [objective.weight(data), objective.num_terms(data), len(data.left_out), stop_requested]
    sums = accelerator.reduce(torch.tensor(local, device=device, dtype=torch.float64), "sum")
    weight = float(sums[0])
    num_terms, all_skipped, stop = (int(x) for x in sums[1:].tolist())
    losses = objective.backward(forward, data, accelerator, weight)
    penalty = method.penalty()
    if penalty is not None:
        # After the reduction of the last micro-batch and equal on all processes: added as it is.
        accelerator.backward(penalty)
    total = accelerator.reduce(losses.sum(), "sum").item()
    if not torch.isfinite(torch.tensor(total)):
        _raise_not_finite("loss", step, data.micro_batches, losses)
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(optimizer)
    part_norms = _part_norms(parameters, part_of_name) if log_parts else {}
    grad_norm = clip_gradients(list(parameters.values()), max_grad_norm)
    if accelerator.scaler is None and not torch.isfinite(grad_norm):
        _raise_not_finite("gradient", step, data.micro_batches, losses)
    optimizer.step()
    was_skipped = bool(optimizer.step_was_skipped)
    method_log = method.after_step(step)
    optimizer.zero_grad()
    return StepResult(
        loss=total / (weight or 1.0),
        penalty=None if penalty is None else float(penalty.detach()),
        grad_norm=float(grad_norm),
        num_terms=num_terms,
        weight=weight,
        num_left_out=all_skipped,
        was_skipped=was_skipped,
        stop=bool(stop),
        part_grad_norms=part_norms,
        method_log=method_log,
    )


class NextToken:
    """The cross-entropy of the supervised tokens, each counting by its turn's weight."""

    unit = "supervised_tokens"
    tensors: Mapping[str, nn.Parameter] = {}

    def num_terms(self, data: StepData) -> int:
        return sum(batch.targets.numel() for batch in _token_batches(data))

    def weight(self, data: StepData) -> float:
        return sum(total_weight(batch.targets, batch.weights) for batch in _token_batches(data))

    def backward(
        self, forward: nn.Module, data: StepData, accelerator: Accelerator, weight: float
    ) -> Tensor:
        losses = []
        batches = _token_batches(data)
        for number, batch in enumerate(batches):
            on_device = to_device(batch, accelerator.device)
            with reduced_at_last(forward, accelerator, number=number, of=len(batches)):
                loss = forward(on_device)
                # DDP takes the mean over processes; the weight is already global.
                accelerator.backward(loss * (accelerator.num_processes / (weight or 1.0)))
            losses.append(loss.detach())
        return torch.stack(losses)

    def log(self) -> dict[str, float]:
        return {}


def _token_batches(data: StepData) -> list[Batch]:
    return [batch for batch in data.micro_batches if isinstance(batch, Batch)]


def reduced_at_last(
    forward: nn.Module, accelerator: Accelerator, *, number: int, of: int
) -> AbstractContextManager[None]:
    """Where a forward and backward pass belongs: gradients are reduced over processes at the last
    of a step's micro-batches only."""
    return contextlib.nullcontext() if number == of - 1 else accelerator.no_sync(forward)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients to a global L2 norm of at most `max_norm`; the norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _part_norms(
    parameters: Mapping[str, nn.Parameter], part_of_name: Mapping[str, str]
) -> dict[str, float]:
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            parts.setdefault(part_of_name[name], []).append(parameter.grad)
    return {p: float(torch.nn.utils.get_total_norm(g)) for p, g in sorted(parts.items())}


def _raise_not_finite(
    what: str, step: int, micro_batches: Sequence[Batch | SideBatch], losses: Tensor
) -> None:
    """Every process gets here in the same step; the suspects of all are named (a collective)."""
    finite = torch.isfinite(losses).tolist()
    suspects = [b for b, ok in zip(micro_batches, finite, strict=True) if not ok]
    found = gather_object([name for b in suspects for name in b.sample_ids if name])
    ids = found or gather_object([name for b in micro_batches for name in b.sample_ids if name])
    shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
    raise VlmtuneError(
        f"step {step}: the {what} is not finite; the weights were not updated",
        got=f"samples of the micro-batch: {shown}" if found else f"samples of the step: {shown}",
        do="look at these samples; lower train.learning_rate or set train.max_grad_norm",
    )
