"""In which precision a device computes: bfloat16, autocast, and the dtype of inference.

torch 2.14 raises where a device type without autocast is named, also to switch it off.

Older ones emulate it, several times slower than float16 and without a word.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from vlmtune.errors import VlmtuneError
from vlmtune.recipe.schema import Recipe


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where products are computed in the dtypes of their tensors."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on `device` now; None where it is off."""
    if not (
        torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    ):
        return None
    return torch.get_autocast_dtype(device.type)


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


def inference_dtype(name: str) -> torch.dtype:
    """The dtype called `name`, float32, bfloat16 or float16.

    `auto`: bfloat16 where the device has instructions for it; otherwise float16 on a GPU, and
    float32 on a CPU, where emulated bfloat16 is several times slower.
    """
    if name != "auto":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[name]
    if torch.cuda.is_available():
        capability = capability_of()
        has_it = capability is None or has_bfloat16(capability)
        return torch.bfloat16 if has_it else torch.float16
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
