"""The one place that configures accelerate, and that asks which machine this is."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import AutocastKwargs

from vlmtune import __version__
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


def leave_out_autocast(accelerator: Accelerator) -> None:
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
