"""Does a merged checkpoint answer as base + adapter do? Logits on samples, and tensor by tensor.

    base + adapter, float32            A    PEFT's forward pass, nothing folded
    the same folded, float32           F    |F - A| <= float32's own error: nothing was lost
    F rounded to the checkpoint dtype  R    |R - F| is what the rounding costs, measured
    the checkpoint on the disk         C    |C - A| <= 2 float32's error + |R - F|,
                                            and nearer to A than to the base alone

All of them are computed in float32 on the CPU. Letters: K compared positions of a sample, V
vocabulary. The tensors: `merge_tensors.py`.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmtune.errors import CheckFailed
from vlmtune.models.merge_probes import Probe

FLOAT32_ERROR = 1e-4
"""Of a logit, relative to the largest one (1 where that is smaller)."""


def require(
    logits: list[Tensor], reference: Reference, *, what: str, blame: Callable[[], str]
) -> MergeReport:
    """The report on `logits`; raises MergeFailed unless they are base + adapter's.

    `blame()` names the weight at fault; it is asked only then.
    """
    probes, adapted, base = reference.probes, reference.adapted, reference.base
    worst = largest_difference(logits, adapted, probes)
    effect = None if base is None else largest_difference(base, adapted, probes).value
    is_lost = (
        base is not None
        and effect is not None
        and effect > float32_tolerance(adapted)
        and mean_difference(logits, adapted) >= 0.5 * mean_difference(base, adapted)
    )
    report = MergeReport(
        output="",
        verified=worst.value <= reference.tolerance and not is_lost,
        max_difference=worst.value,
        tolerance=reference.tolerance,
        dtype=str(reference.dtype).removeprefix("torch."),
        rounding=reference.rounding,
        adapter_effect=effect,
        same_tokens_fraction=argmax_agreement(logits, adapted),
        num_samples=len(probes),
        num_positions=sum(p.positions.numel() for p in probes),
        worst_sample=worst.sample,
        worst_position=worst.position,
        peak_memory_bytes=peak_memory_bytes(),
    )
    if worst.value > reference.tolerance:
        raise MergeFailed(
            f"{what} does not answer as base + adapter: logits differ by {worst.value:.3g} in "
            f"sample {worst.sample}, position {worst.position}" + blame(),
            report,
            expected=f"at most {reference.tolerance:.3g}",
        )
    if is_lost:
        raise MergeFailed(
            f"{what} is not nearer to base + adapter than to the base alone: rounding to "
            f"{report.dtype} loses the adapter",
            report,
            got=f"logits off by {worst.value:.3g}, where the adapter moves them by {effect:.3g}",
            do="merge with --dtype float32",
        )
    return report


def no_logits(reference: Reference) -> MergeReport:
    """The report on a checkpoint that cannot be asked for logits."""
    return MergeReport(
        output="",
        verified=False,
        max_difference=float("inf"),
        tolerance=reference.tolerance,
        dtype=str(reference.dtype).removeprefix("torch."),
        rounding=reference.rounding,
        adapter_effect=None,
        same_tokens_fraction=0.0,
        num_samples=len(reference.probes),
        num_positions=0,
        worst_sample="",
        worst_position=0,
        peak_memory_bytes=peak_memory_bytes(),
    )


def largest_difference(
    first: Sequence[Tensor], second: Sequence[Tensor], probes: Sequence[Probe]
) -> Difference:
    """Where two sets of logits are farthest apart; a NaN counts as infinitely far."""
    worst = Difference(-1.0, "", 0)
    for a, b, probe in zip(first, second, probes, strict=True):
        gaps = (a - b).abs().amax(dim=1).nan_to_num(nan=float("inf"))  # (K,)
        at = int(gaps.argmax())
        if float(gaps[at]) > worst.value:
            worst = Difference(float(gaps[at]), probe.id, int(probe.positions[at]))
    return worst


def mean_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return float(
        torch.cat([(a - b).abs().flatten() for a, b in zip(first, second, strict=True)]).mean()
    )


def argmax_agreement(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The fraction of positions with the same most likely token."""
    equal = [a.argmax(1) == b.argmax(1) for a, b in zip(first, second, strict=True)]
    return float(torch.cat(equal).float().mean())


def float32_tolerance(logits: Sequence[Tensor]) -> float:
    """What two orders of the same float32 sums may differ by, for logits of this size."""
    return FLOAT32_ERROR * max(1.0, max(float(x.abs().max()) for x in logits))


def peak_memory_bytes() -> int:
    """The most memory that this process ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and how far its logits are from base + adapter (largest over all).

    `rounding` is the part that the checkpoint's dtype explains, `adapter_effect` how far the base
    alone is away (None for a run without an adapter), `same_tokens_fraction` of the compared
    positions have the same most likely token. `peak_memory_bytes`: the most that the process ever
    had resident, libraries included.
    """

    output: str
    verified: bool
    max_difference: float
    tolerance: float
    dtype: str
    rounding: float
    adapter_effect: float | None
    same_tokens_fraction: float
    num_samples: int
    num_positions: int
    worst_sample: str
    worst_position: int
    peak_memory_bytes: int


class MergeFailed(CheckFailed):
    """The merged model is not base + adapter; nothing was left at the output. Exits 1."""

    def __init__(self, message: str, report: MergeReport, **details: Any) -> None:
        super().__init__(message, **details)
        self.report = report


@dataclass(frozen=True)
class Reference:
    """Logits to hold the checkpoint against; each list has a (K, V) tensor per probe."""

    dtype: torch.dtype
    probes: list[Probe]
    adapted: list[Tensor]
    base: list[Tensor] | None
    rounding: float
    tolerance: float


@dataclass(frozen=True)
class Difference:
    """The largest difference of two sets of logits, and where it is."""

    value: float
    sample: str
    position: int
