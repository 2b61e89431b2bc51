"""One optimizer step, token-exact over micro-batches and processes, and the loss on held-out data.

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
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from vlmtune.data.batches import BatchLayout, make_batches, share_mark
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Batch, Conversation
from vlmtune.errors import SampleError
from vlmtune.models.forward import total_weight
from vlmtune.train.feed import StepBatch
from vlmtune.train.runtime import prefetch_to_device, to_device
from vlmtune.train.step_metrics import AsyncStepMetrics, counts_of


class Method(Protocol):
    """What the step needs of an adapter method."""

    def penalty(self) -> Tensor | None: ...

    def after_step(self, step: int, *, skipped: Tensor | None = None) -> dict[str, object]: ...


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


def train_step(
    forward: nn.Module,
    *,
    step: int,
    data: StepBatch,
    objective: Objective,
    method: Method,
    parameters: Mapping[str, nn.Parameter],
    part_of_name: Mapping[str, str],
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
    max_grad_norm: float | None,
    stop_requested: bool = False,
    log_parts: bool = False,
    defer_sync: bool = False,
) -> AsyncStepMetrics:
    """Forward and backward over this process's `data`, then update. With several processes it
    contains two collectives (counts, losses) besides DDP's and the objective's own.

    Raises `VlmtuneError` on all processes, before the update, when the loss or the gradient is not
    finite on any of them, or the step's samples are not shared out one by one. With `late`, no
    figure is read here and `AsyncStepMetrics.read` raises it.
    """
    local = [
        objective.weight(data),
        objective.num_terms(data),
        len(data.left_out),
        stop_requested,
        share_mark(data.positions),
    ]
    counts = counts_of(local, accelerator, defer_sync=defer_sync)
    losses = objective.backward(forward, data, accelerator, counts.divisor)
    penalty = method.penalty()
    if penalty is not None:
        # After the reduction of the last micro-batch and equal on all processes: added as it is.
        accelerator.backward(penalty)
    total = accelerator.reduce(losses.sum(), "sum")
    pending = AsyncStepMetrics(
        step, data=data, counts=counts, losses=losses, accelerator=accelerator
    )
    if not defer_sync:
        pending.check_shares()
        pending.check("loss", total)
    skipped = None
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(optimizer.optimizer)
        skipped = ~_all_finite(optimizer)
    part_norms = _part_norms(parameters, part_of_name) if log_parts else {}
    grad_norm = clip_gradients(list(parameters.values()), max_grad_norm)
    if not defer_sync and accelerator.scaler is None:
        pending.check("gradient", grad_norm)
    pending.send(
        total=total, grad_norm=grad_norm, penalty=penalty, part_norms=part_norms, skipped=skipped
    )
    optimizer.step()
    pending.method_log = method.after_step(step, skipped=skipped)
    optimizer.zero_grad()
    return pending


class NextToken:
    """The cross-entropy of the supervised tokens, each counting by its turn's weight."""

    unit = "supervised_tokens"
    tensors: Mapping[str, nn.Parameter] = {}

    def num_terms(self, data: StepBatch) -> int:
        return sum(batch.targets.numel() for batch in _token_batches(data))

    def weight(self, data: StepBatch) -> float:
        return sum(total_weight(batch.targets, batch.weights) for batch in _token_batches(data))

    def backward(
        self,
        forward: nn.Module,
        data: StepBatch,
        accelerator: Accelerator,
        weight: float | Tensor,
    ) -> Tensor:
        losses = []
        batches = _token_batches(data)
        for number, batch in enumerate(prefetch_to_device(batches, accelerator.device)):
            with reduced_at_last(forward, accelerator, number=number, of=len(batches)):
                loss = forward(batch)
                # DDP takes the mean over processes; the weight is already global.
                accelerator.backward(loss * (accelerator.num_processes / weight))
            losses.append(loss.detach())
        return torch.stack(losses)

    def log(self) -> dict[str, float]:
        return {}


def _token_batches(data: StepBatch) -> list[Batch]:
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


def _all_finite(optimizer: AcceleratedOptimizer) -> Tensor:
    """Whether every gradient of `optimizer` is finite, those of the objective's tensors too; where
    one is not, the loss scaler throws the step away. Not read here."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in tensors if p.grad is not None]
    return torch.isfinite(torch.nn.utils.get_total_norm(grads, norm_type=float("inf")))


def _part_norms(
    parameters: Mapping[str, nn.Parameter], part_of_name: Mapping[str, str]
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            parts.setdefault(part_of_name[name], []).append(parameter.grad)
    return {part: torch.nn.utils.get_total_norm(g) for part, g in sorted(parts.items())}


CHUNK = 256
"""Samples encoded at once: bounds the memory of their pictures."""


@torch.no_grad()
def evaluation_loss(
    forward: nn.Module,
    conversations: Sequence[Conversation],
    *,
    encoder: Encoder,
    accelerator: Accelerator,
    layout: BatchLayout,
) -> dict[str, float]:
    """`loss` in nats per supervised token, weighted as in training, and `skipped`, the samples that
    could not be used. Without a supervised token there is no `loss`.

    Samples that have no answer to learn, as where `answers` alone are given, count in neither.
    `forward` is the unwrapped module. Contains one collective.
    """
    learnt = [c for c in conversations if encoder.is_supervised(c)]
    mine = learnt[accelerator.process_index :: accelerator.num_processes]
    total, weight, skipped = 0.0, 0.0, 0
    for start in range(0, len(mine), CHUNK):
        samples = []
        for conversation in mine[start : start + CHUNK]:
            try:
                samples.append(encoder.encode(conversation))
            except SampleError:
                skipped += 1
        for made in make_batches(samples, layout):
            batch = to_device(made, accelerator.device)
            with accelerator.autocast():
                total += forward(batch).item()
            weight += total_weight(batch.targets, batch.weights)
    sums = torch.tensor([total, weight, skipped], dtype=torch.float64, device=accelerator.device)
    total, weight, skipped = accelerator.reduce(sums, "sum").tolist()
    result = {"loss": total / weight} if weight else {}
    return result | ({"skipped": float(skipped)} if skipped else {})
