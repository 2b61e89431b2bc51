"""Which CUDA devices have bfloat16, and what a recipe asks of one that has not.

Older ones emulate it, several times slower than float16 and without a word.
"""

from __future__ import annotations

import torch

from vlmtune.errors import VlmtuneError
from vlmtune.recipe.schema import Recipe

Capability = tuple[int, int]
"""A CUDA device's compute capability, as (7, 5)."""

BFLOAT16_SINCE: Capability = (8, 0)


def capability_of(device: torch.device | None = None) -> Capability | None:
    """Of a CUDA device, by default the one that this process computes on; None for any other
    device, and for AMD's, which have bfloat16 and number themselves otherwise."""
    is_cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    if not is_cuda or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def has_bfloat16(capability: Capability) -> bool:
    """Whether a CUDA device has instructions for bfloat16."""
    return capability >= BFLOAT16_SINCE


def bfloat16_errors(recipe: Recipe, capability: Capability | None) -> list[VlmtuneError]:
    """What of `recipe` a device of this capability has no instructions for; None: not known, and
    nothing is said."""
    if capability is None or has_bfloat16(capability):
        return []
    found = []
    if recipe.train.precision == "bf16":
        found.append(("train.precision", "bf16", "fp16", "fp32"))
    if recipe.quantization_bit == 4 and recipe.quantization.compute_dtype == "bfloat16":
        found.append(("quantization.compute_dtype", "bfloat16", "float16", "float32"))
    device = ".".join(map(str, capability))
    least = ".".join(map(str, BFLOAT16_SINCE))
    return [
        VlmtuneError(
            f"{key}: this GPU has no bfloat16 (compute capability {device}, {least} has it)",
            got=f"{key}: {given}",
            expected=f"{half} or {single}",
            do=f"set {key}={half}, or {key}={single} for more memory and time",
        )
        for key, given, half, single in found
    ]
