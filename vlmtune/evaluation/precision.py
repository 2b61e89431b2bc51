"""The dtype a model is run in when nothing is trained."""

from __future__ import annotations

import torch

from vlmtune.models.bfloat16 import capability_of, has_bfloat16


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
