"""The loss on held-out conversations: token-exact, over all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from vlmtune.data.batches import BatchLayout, make_batches
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.errors import SampleError
from vlmtune.models.loss import total_weight
from vlmtune.train.transfer import to_device

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
