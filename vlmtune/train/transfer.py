"""Tensors on their way between the host and a CUDA device, without the host waiting for them.

    DataLoader -> pinned batch -> `ahead`: the next micro-batch is copied while one computes
    device value -> `to_host` -> pinned copy, read once `Arrival.wait` returns

On any other device nothing is pinned and nothing is in flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmtune.data.types import Batch, SideBatch

AnyBatch = TypeVar("AnyBatch", bound=Batch | SideBatch)


class Arrival:
    """The moment at which everything that was queued on a device before it is done."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def to_host(tensor: Tensor) -> Tensor:
    """A copy of `tensor` in the host's memory, which later changes of it do not reach.

    From CUDA into pinned memory: it is there when an `Arrival` made after it has come.
    """
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)


def to_device_late(values: Sequence[float], device: torch.device) -> Tensor:
    """`values` as a float64 tensor on `device`; the host does not wait for it."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_device(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """The batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    return _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(batch: AnyBatch) -> AnyBatch:
    """The batch with its tensors in pinned memory, from which a CUDA device copies by itself."""
    return _mapped(batch, lambda tensor: tensor.pin_memory())


def ahead(batches: Sequence[AnyBatch], device: torch.device) -> Iterator[AnyBatch]:
    """The batches on `device`, in turn. On CUDA each is copied on a stream of its own while the
    one before it computes: two are on the device at once."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    copies, computes = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    coming: list[tuple[AnyBatch, torch.cuda.Event]] = []
    for batch in [*batches, None]:
        if batch is not None:
            with torch.cuda.stream(copies):
                coming.append((to_device(batch, device), copies.record_event()))
        if len(coming) == 2 or (batch is None and coming):
            present, is_there = coming.pop(0)
            computes.wait_event(is_there)
            for tensor in _tensors(present):
                # Its memory belongs to the copying stream, which must not reuse it before.
                tensor.record_stream(computes)
            yield present


def _mapped(batch: AnyBatch, change: Any) -> AnyBatch:
    changed: dict[str, Any] = {
        field.name: change(value)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, inputs={k: change(v) for k, v in batch.inputs.items()}, **changed)


def _tensors(batch: Batch | SideBatch) -> list[Tensor]:
    own = [getattr(batch, field.name) for field in fields(batch)]
    return [t for t in [*own, *batch.inputs.values()] if isinstance(t, Tensor)]
