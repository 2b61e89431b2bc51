"""Made-up features of pictures, by number, and a store for them: also for other processes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vlmtune.files import DiskStore
from vlmtune.models.vision_cache import Tensors, open_disk_store


def key_of(number: int) -> str:
    return f"{number:064x}"


def features(number: int, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    made = torch.randn(rows, 8, generator=generator)
    return {"0": made, "1": made[::2].to(torch.bfloat16)}


def store_in(folder: Path, *, max_bytes: int = 10**6, tower: str = "t") -> DiskStore[Tensors]:
    return open_disk_store(folder, tower, max_bytes=max_bytes, num_processes=1)
