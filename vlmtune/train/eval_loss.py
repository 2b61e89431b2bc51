"""The loss on held-out conversations: token-exact, over all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from vlmtune.data.collate import MediaLayout, collate
from vlmtune.data.encode import Encoder
from vlmtune.data.packing import plan_micro_batches
from vlmtune.data.types import Conversation
from vlmtune.errors import SampleError
from vlmtune.train.feed import to_device
from vlmtune.train.loss import summed_cross_entropy, total_weight

CHUNK = 256
"""Samples encoded at once: bounds the memory of their pictures."""


@torch.no_grad()
def evaluation_loss(
    forward: nn.Module,
    conversations: Sequence[Conversation],
    *,
    encoder: Encoder,
    accelerator: Accelerator,
    micro_batch_tokens: int,
    pad_token_id: int,
    media_layout: MediaLayout,
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
        for rows in plan_micro_batches([s.num_tokens for s in samples], micro_batch_tokens):
            batch = collate(
                [samples[i] for i in rows], pad_token_id=pad_token_id, media_layout=media_layout
            )
            batch = to_device(batch, accelerator.device)
            with accelerator.autocast():
                logits = forward(batch.inputs, batch.supervised)
            total += summed_cross_entropy(logits, batch.targets, batch.weights).item()
            weight += total_weight(batch.targets, batch.weights)
    sums = torch.tensor([total, weight, skipped], dtype=torch.float64, device=accelerator.device)
    total, weight, skipped = accelerator.reduce(sums, "sum").tolist()
    result = {"loss": total / weight} if weight else {}
    return result | ({"skipped": float(skipped)} if skipped else {})
