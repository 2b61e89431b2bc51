"""The one place that configures accelerate: processes, signals, and transfers to the device.

    DataLoader -> pinned batch -> `prefetch_to_device`: the next one is copied while one computes
    device value -> `to_host` -> pinned copy, read once `CudaEvent.wait` returns

On any other device nothing is pinned and nothing is in flight.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from importlib import metadata
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from torch import Tensor

from vlmtune import __version__
from vlmtune.data.types import Batch, ContrastiveBatch
from vlmtune.errors import VlmtuneError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def check_environment(precision: str) -> None:
    """Refuse `ACCELERATE_*` variables that would override the recipe or that training cannot do."""
    launch = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launch not in ("no", precision):
        raise VlmtuneError(
            "accelerate's configuration contradicts the recipe",
            got=f"ACCELERATE_MIXED_PRECISION={launch}",
            expected=f"train.precision: {precision}",
            do="launch without --mixed_precision; the recipe decides",
        )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("", "1"):
        raise VlmtuneError(
            "accelerate's configuration contradicts the recipe",
            got=f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accumulation}",
            expected="1",
            do="set train.batch_size and train.micro_batch_tokens instead",
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise VlmtuneError(
                f"{name} is not supported; training runs on one device or with DDP",
                got=f"ACCELERATE_USE_{name}",
                do="launch with `accelerate launch --multi_gpu -m vlmtune train …`",
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise VlmtuneError(
            "torch.compile through accelerate is not supported",
            got="ACCELERATE_DYNAMO_BACKEND",
            do="launch without --dynamo_backend",
        )


def build_accelerator(precision: str) -> Accelerator:
    """An accelerator at accumulation 1 in the recipe's precision.

    Raises `VlmtuneError` where an environment variable would override the recipe, and for fp16 on
    a CPU. Joins the process group of `accelerate launch` (a collective).
    """
    check_environment(precision)
    # No buffer of the model changes in training; broadcasting them would be a collective a forward.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    if precision == "fp16" and not torch.cuda.is_available():
        raise VlmtuneError(
            "fp16 needs a CUDA device", got="train.precision: fp16", do="set bf16 or fp32"
        )
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        gradient_accumulation_steps=1,
        kwargs_handlers=[ddp],
    )


def disable_autocast(accelerator: Accelerator) -> None:
    """Let a model that computes in its own dtypes do so: what is prepared after this is not run
    under autocast. fp16's loss scaler stays."""
    accelerator.autocast_handler = AutocastKwargs(enabled=False)


@contextlib.contextmanager
def joined(accelerator: Accelerator) -> Iterator[Accelerator]:
    """Leave the process group on the way out, also on an error."""
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        # accelerate would refuse another precision in the next run of this process.
        AcceleratorState._reset_state(reset_partial_state=True)


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: of the CUDA allocator, or of the process (resident) on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def describe_environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions and hardware, for `environment.json`."""
    cuda = accelerator.device.type == "cuda"
    return {
        "versions": {"vlmtune": __version__} | {name: metadata.version(name) for name in VERSIONED},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
    }


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While entered, remembers the first SIGINT or SIGTERM in `received` instead of dying of it.
    Only in the main thread: Python lets no other one set how a signal is handled."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        is_main_thread = threading.current_thread() is threading.main_thread()
        for number in SIGNALS if is_main_thread else ():
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that this signal ended: 130 for Ctrl-C, 143 for TERM.
        Another process may have got it: then 130."""
        return 128 + (self.received or signal.SIGINT)


AnyBatch = TypeVar("AnyBatch", bound=Batch | ContrastiveBatch)


class CudaEvent:
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

    From CUDA into pinned memory: it is there when an `CudaEvent` made after it has come.
    """
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)


def to_device_async(values: Sequence[float], device: torch.device) -> Tensor:
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


def prefetch_to_device(batches: Sequence[AnyBatch], device: torch.device) -> Iterator[AnyBatch]:
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


def _tensors(batch: Batch | ContrastiveBatch) -> list[Tensor]:
    own = [getattr(batch, field.name) for field in fields(batch)]
    return [t for t in [*own, *batch.inputs.values()] if isinstance(t, Tensor)]
