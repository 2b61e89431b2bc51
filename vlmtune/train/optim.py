"""Optimizers, parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vlmtune.recipe.schema import TrainSection

log = logging.getLogger("vlmtune")

BETAS = (0.9, 0.999)
EPS = 1e-8
FUSED_DEVICES = ("cpu", "cuda")
"""Where torch updates all tensors of a group in one call."""


def resolve_count(value: float, total: int, *, whole: bool) -> int:
    """A fraction of `total` or an absolute step count, as optimizer steps.

    `whole`: 1.0 is the whole of training (`eval_every`); otherwise 1 is one step (`warmup`).
    """
    is_fraction = value <= 1 if whole else value < 1
    return max(int(whole), round(value * total)) if is_fraction else round(value)


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """The share of the peak learning rate at optimizer step `step` (1-based), in (0, 1].

    Linear warm-up over the first `warmup_steps`, then constant, linear or cosine towards 0, which
    step `total_steps + 1` would reach: the last step still learns.
    """
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    progress = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(
    named: Mapping[str, nn.Parameter],
    *,
    part_of_name: Mapping[str, str],
    section: TrainSection,
    no_decay: set[str],
) -> list[dict[str, Any]]:
    """One group for each part and decay setting; `peak_lr` is what the schedule scales.

    Vectors (biases, norms, DoRA's magnitudes) and the names in `no_decay` get no weight decay.
    """
    part_rates = {str(part): rate for part, rate in section.part_learning_rates.items()}
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in named.items():
        part = part_of_name[name]
        decays = section.weight_decay > 0 and parameter.ndim > 1 and name not in no_decay
        rate = part_rates.get(part, section.learning_rate)
        group = groups.setdefault(
            (part, decays),
            {
                "params": [],
                "part": part,
                "lr": rate,
                "peak_lr": rate,
                "weight_decay": section.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def own_group(tensors: Mapping[str, nn.Parameter], rate: float) -> dict[str, Any]:
    """The group of what the objective learns itself; its part is called `objective`."""
    group = {"part": "objective", "lr": rate, "peak_lr": rate, "weight_decay": 0.0}
    return {"params": list(tensors.values()), **group}


def build_optimizer(
    groups: list[dict[str, Any]], *, kind: str, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW with 32- or 8-bit state, paged on CUDA; `adamw` is torch's fused kind.

    Paging is CUDA's unified memory; elsewhere the unpaged kind is used, with a notice.
    """
    if kind.startswith("paged_") and device.type != "cuda":
        kind = kind.removeprefix("paged_")
        log.info("paged optimizer state needs CUDA; using %s on %s", kind, device.type)
    if kind == "adamw":
        fused = device.type in FUSED_DEVICES
        return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=fused)
    import bitsandbytes as bnb

    classes = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }
    return classes[kind](groups, betas=BETAS, eps=EPS)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Scale every group's peak by `factor`; the rate now in effect for each part."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["part"]] = group["lr"]
    return rates
