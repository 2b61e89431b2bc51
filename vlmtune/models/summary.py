"""What is trained, read off the built model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from vlmtune.models.family import Family, kind_of, part_of
from vlmtune.models.forward import base_of

IN_FULL = "in full"


@dataclass(frozen=True)
class TrainedRow:
    """Modules of one part, kind and rank; `rank` is empty for what is trained in full."""

    part: str
    kind: str
    modules: int
    rank: int | None
    trainable_parameters: int


def trained_rows(model: nn.Module, family: Family) -> list[TrainedRow]:
    """One row for each part, kind and rank that trains, in the order of the parts."""
    base = base_of(model)
    counts: dict[tuple[str, str, int | None], list[int]] = defaultdict(list)
    inside: set[str] = set()
    for path, module in base.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        adapter = module.active_adapters[0]
        named = {f"{path}.{n}": p for n, p in module.named_parameters()}
        inside |= named.keys()
        size = sum(p.numel() for p in named.values() if p.requires_grad)
        rank = module.r[adapter]
        counts[(part_of(path, family) or "other", kind_of(path, family), int(rank))].append(size)
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and name not in inside:
            counts[(part_of(name, family) or "other", IN_FULL, None)].append(parameter.numel())
    return [
        TrainedRow(part, kind, len(sizes), rank, sum(sizes))
        for (part, kind, rank), sizes in sorted(counts.items(), key=lambda item: str(item[0]))
    ]
