"""Cross-entropy as a sum, so that the caller divides once by the global count.

    hidden states (S, D) -> a chunk of rows -> output layer -> logits (C, V) -> cross-entropy
                                                  -> gradient of the rows, kept; logits dropped

S supervised tokens, C of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_NUMBERS = {"cpu": 2**22}
LARGE_CHUNK_NUMBERS = 2**24
"""Logits at once. 16 MB in float32 stay in a CPU's cache: 1,000 rows of 8,192 took 49 ms, as a
whole 112 ms; elsewhere 64 MB."""


def summed_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the supervised tokens of -weight log p(target), in nats, float32.

    `logits` (S, V), `targets` (S,), `weights` (S,) or None where each is 1. With S = 0 it is 0 and
    still a function of `logits`, so that a micro-batch without a supervised token stays in the
    graph.
    """
    if targets.numel() == 0:
        return logits.sum() * 0.0
    if weights is None:
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def chunked_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    chunk_rows: int,
) -> Tensor:
    """`summed_cross_entropy(head(hidden), targets, weights)`, of which never more than `chunk_rows`
    rows of logits are there at once.

    `hidden` (S, D). The gradients are computed with the loss, chunk by chunk, and only scaled in
    the backward pass: nothing is computed twice.
    """
    if _takes_liger(head, hidden, targets, weights):
        return _liger_loss(head, hidden, targets)
    if len(targets) <= chunk_rows:
        return summed_cross_entropy(head(hidden), targets, weights)
    trained = [p for p in head.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        return torch.stack(
            [_loss_of(head, hidden, targets, weights, rows) for rows in _chunks(hidden, chunk_rows)]
        ).sum()
    loss: Tensor = _Chunked.apply(head, chunk_rows, targets, weights, hidden, *trained)
    return loss


def chunk_rows_of(vocabulary: int, device_type: str) -> int:
    """Rows of logits at once for an output layer of so many tokens."""
    return max(16, CHUNK_NUMBERS.get(device_type, LARGE_CHUNK_NUMBERS) // vocabulary)


def _takes_liger(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None) -> bool:
    """Whether Liger's fused kernel computes this loss: CUDA, a plain output layer, tokens that
    all count 1, and the package is installed."""
    return (
        hidden.device.type == "cuda"
        and type(head) is nn.Linear
        and weights is None
        and targets.numel() > 0
        and find_spec("liger_kernel") is not None
    )


def _liger_loss(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same sum by Liger (Hsu et al. 2024, arXiv 2410.10989). Not run on a GPU yet."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    loss: Tensor = fused(head.weight, hidden.to(head.weight.dtype), targets, head.bias)
    return loss.float()


class _Chunked(torch.autograd.Function):
    """The loss of all chunks, and the gradients of `hidden` and of the head's trained tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Callable[[Tensor], Tensor],
        chunk_rows: int,
        targets: Tensor,
        weights: Tensor | None,
        hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[4] else None
        of_trained = [torch.zeros_like(p) for p in trained]
        for rows in _chunks(hidden, chunk_rows):
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_(of_hidden is not None)
                some = None if weights is None else weights[rows]
                loss = summed_cross_entropy(head(part), targets[rows], some)
            wanted = [*([part] if of_hidden is not None else []), *trained]
            gradients = list(torch.autograd.grad(loss, wanted))
            if of_hidden is not None:
                of_hidden[rows] = gradients.pop(0)
            for kept, gradient in zip(of_trained, gradients, strict=True):
                kept += gradient
            total += loss.detach()
        ctx.gradients = (of_hidden, *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        # In float32: in the gradient's 16 bit the scale would be off by up to 0.39 %, and fp16 has
        # no number for a loss scale of 65536.
        scaled = [None if g is None else (g.float() * scale).to(g.dtype) for g in ctx.gradients]
        ctx.gradients = None
        return None, None, None, None, *scaled


def _loss_of(
    head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor | None, rows: slice
) -> Tensor:
    some = None if weights is None else weights[rows]
    return summed_cross_entropy(head(hidden[rows]), targets[rows], some)


def _chunks(hidden: Tensor, chunk_rows: int) -> list[slice]:
    return [slice(start, start + chunk_rows) for start in range(0, len(hidden), chunk_rows)]


def total_weight(targets: Tensor, weights: Tensor | None) -> float:
    """What the sum above is divided by: the weights of its terms, summed in float64; their number
    where each is 1."""
    return float(targets.numel() if weights is None else weights.sum(dtype=torch.float64))
