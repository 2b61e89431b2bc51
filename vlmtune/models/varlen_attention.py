"""Causal attention within each sample of a pack by flash attention's variable-length kernel (CUDA).

One launch for all samples, in 16 bit, on devices from Ampere on, where torch has the kernel with
grouped keys; elsewhere the caller attends sample by sample. Not run on a GPU yet.

Letters: H heads, K key heads, N tokens of the pack, D width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor

AMPERE = (8, 0)
CAUSAL = (-1, 0)
"""The window of a query: any number of keys before it, none after."""


def can_use_varlen(query: Tensor) -> bool:
    """Whether the kernel takes a query (H, N, D) as it is."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= AMPERE
        and _has_kernel()
    )


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, *, lengths: Sequence[int], scale: float
) -> Tensor:
    """Of `query` (H, N, D), `key` and `value` (K, N, D): the output (H, N, D)."""
    from torch.nn.attention.varlen import varlen_attn

    starts = _starts(tuple(lengths), query.device)
    longest = max(lengths)
    output: Tensor = varlen_attn(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=CAUSAL,
        enable_gqa=len(query) != len(key),
    )  # (N, H, D)
    return output.transpose(0, 1)


@lru_cache(maxsize=4)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sample starts, and where the last one ends, int32: once for all layers."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


@lru_cache(maxsize=1)
def _has_kernel() -> bool:
    """Whether this torch has the kernel, with the arguments given above."""
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(
        varlen_attn
    ).parameters.keys()
