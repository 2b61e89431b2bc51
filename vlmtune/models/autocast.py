"""Autocast, asked of any device: the meta device, on which a model is only looked at, has none.

torch 2.14 raises where a device type without autocast is named, also to switch it off.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


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
