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
from vlmtune.train.state import TrainState
from vlmtune.train.step_metrics import AsyncStepMetrics, counts_of


def train_step(
    state: TrainState,
    batch: StepBatch,
    *,
    step: int,
    accelerator: Accelerator,
    max_grad_norm: float | None,
    stop_requested: bool = False,
    log_parts: bool = False,
    defer_sync: bool = False,
) -> AsyncStepMetrics:
    """Forward and backward over this process's micro-batches, then update. With several processes
    it contains two collectives (counts, losses) besides DDP's and the objective's own.

    Raises `VlmtuneError` on all processes, before the update, when the loss or the gradient is not
    finite on any of them, or the step's samples are not shared out one by one. With `defer_sync`,
    no figure is read here and `AsyncStepMetrics.read` raises it.
    """
    objective, optimizer, scaler = state.objective, state.optimizer, accelerator.scaler
    local = [
        objective.weight(batch),
        objective.num_terms(batch),
        len(batch.left_out),
        stop_requested,
        share_mark(batch.positions),
    ]
    counts = counts_of(local, accelerator, defer_sync=defer_sync)
    losses = objective.backward(state.forward, batch, accelerator, counts.divisor)
    penalty = state.adapter.penalty()
    if penalty is not None:
        # After the reduction of the last micro-batch and equal on all processes: added as it is.
        accelerator.backward(penalty)
    total = accelerator.reduce(losses.sum(), "sum")
    metrics = AsyncStepMetrics(
        step, batch=batch, counts=counts, losses=losses, accelerator=accelerator
    )
    if not defer_sync:
        metrics.check_shares()
        metrics.check("loss", total)
    skipped = None
    if scaler is not None:
        scaler.unscale_(optimizer.optimizer)
        skipped = ~_all_finite(optimizer)
    part_norms = _part_norms(state) if log_parts else {}
    grad_norm = clip_gradients(list(state.parameters.values()), max_grad_norm)
    if not defer_sync and scaler is None:
        metrics.check("gradient", grad_norm)
    metrics.send(
        total=total, grad_norm=grad_norm, penalty=penalty, part_norms=part_norms, skipped=skipped
    )
    optimizer.step()
    metrics.adapter_log = state.adapter.after_step(step, skipped=skipped)
    optimizer.zero_grad()
    return metrics


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


def _part_norms(state: TrainState) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in state.parameters.items():
        if parameter.grad is not None:
            parts.setdefault(state.part_of_name[name], []).append(parameter.grad)
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
