"""The samples of a process's share of a step as micro-batches: packs, or padded rows.

samples -> plan within the budget (packing.py) -> pack | collate (collate.py) -> Batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.data.collate import MediaLayout, collate, pack
from vlmtune.data.packing import Budget, plan_packs, plan_padded
from vlmtune.data.types import Batch, Sample


@dataclass(frozen=True)
class BatchLayout:
    """How samples lie side by side. `packs`: the model keeps the samples of one row apart."""

    budget: Budget
    pad_token_id: int
    media_layout: MediaLayout
    packs: bool


def make_batches(samples: Sequence[Sample], layout: BatchLayout) -> list[Batch]:
    """Micro-batches that hold each of `samples` once, largest first."""
    lengths = [sample.num_tokens for sample in samples]
    supervised = [sample.num_supervised for sample in samples]
    plan = plan_packs if layout.packs else plan_padded
    groups = plan(lengths, supervised, budget=layout.budget)
    return [make_batch([samples[at] for at in group], layout) for group in groups]


def make_batch(samples: Sequence[Sample], layout: BatchLayout) -> Batch:
    """One micro-batch of all of `samples`."""
    if layout.packs:
        return pack(samples, media_layout=layout.media_layout)
    return collate(samples, pad_token_id=layout.pad_token_id, media_layout=layout.media_layout)
