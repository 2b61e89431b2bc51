"""Cross-entropy as a sum, so that the caller divides once by the global count.

S supervised tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over the supervised tokens of -log p(target), in nats, float32.

    `logits` (S, V), `targets` (S,). With S = 0 it is 0 and still a function of `logits`, so that a
    micro-batch without a supervised token stays in the graph.
    """
    if targets.numel() == 0:
        return logits.sum() * 0.0
    return F.cross_entropy(logits.float(), targets, reduction="sum")
