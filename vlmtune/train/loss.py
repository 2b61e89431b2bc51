"""Cross-entropy as a sum, so that the caller divides once by the global count.

S supervised tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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


def total_weight(targets: Tensor, weights: Tensor | None) -> float:
    """What the sum above is divided by: the weights of its terms, summed in float64; their number
    where each is 1."""
    return float(targets.numel() if weights is None else weights.sum(dtype=torch.float64))
