"""Checkpoints: written beside, synced, renamed; complete or absent.

    checkpoints/
      step-000100/
        tensors.safetensors   every trained tensor at full size, and the adapter method's state
        optimizer.pt          the optimizer's state and, in fp16, the loss scaler's
        rng.pt                random state of every process
        state.json            step, fingerprint of recipe and data, number of processes
      .writing-step-000150/   an unfinished one; removed by the next save

A reader only looks at `step-*`; a kill at any moment leaves the last complete one in place.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmtune.errors import VlmtuneError
from vlmtune.train.best import Best

WRITING = ".writing-"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. `fingerprint` maps what must not change between stop and resume (recipe
    keys, data files) to its value or hash. `num_bad`: bad samples so far, as they count against
    `data.max_bad_fraction`. `cursor`: where a stream of rows stands (`StreamCursor.as_dict`)."""

    step: int
    num_processes: int
    fingerprint: dict[str, Any]
    left_out: list[dict[str, Any]]
    best: Best | None = None
    num_bad: int | None = None
    cursor: dict[str, Any] | None = None


@dataclass
class Checkpoint:
    state: TrainState
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: list[dict[str, Any]]


def random_state() -> dict[str, Any]:
    """The random state of this process: Python's, torch's, and CUDA's where there is one."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder/step-NNNNNN` and remove all but the `keep` newest and the best of each of
    these, so that a run can go on from any that is left. One process calls this.

    Raises `VlmtuneError` where the disk refuses; earlier checkpoints stay as they were.
    """
    step = checkpoint.state.step
    final = checkpoint_path(folder, step)
    writing = folder / f"{WRITING}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{WRITING}*"):
            shutil.rmtree(old)
        writing.mkdir()
        tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
        save_file(tensors, writing / "tensors.safetensors")
        torch.save(checkpoint.optimizer, writing / "optimizer.pt")
        torch.save(checkpoint.rng, writing / "rng.pt")
        (writing / "state.json").write_text(json.dumps(asdict(checkpoint.state), indent=1))
        sync_folder(writing)
        if final.exists():
            shutil.rmtree(final)
        writing.rename(final)
        sync_path(folder)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError from its zip writer.
        shutil.rmtree(writing, ignore_errors=True)
        raise VlmtuneError(
            f"the checkpoint of step {step} could not be written: {error}",
            file=folder,
            got=f"{shutil.disk_usage(folder.parent).free / 1e6:.0f} MB free",
            do="free space and run again with --resume auto; earlier checkpoints are intact",
        ) from error
    found = complete_checkpoints(folder)
    bests = [read_state(path).best for path in found[-keep:]]
    kept = {checkpoint_path(folder, best.step) for best in bests if best is not None}
    for old in found[:-keep]:
        if old not in kept:
            shutil.rmtree(old)
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in the folder of checkpoints."""
    return folder / f"step-{step:06d}"


def is_complete(path: Path) -> bool:
    """Whether `path` is a whole checkpoint."""
    return (path / "state.json").is_file()


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if is_complete(p)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder onto the CPU. Raises `VlmtuneError` where it is not one."""
    if not is_complete(path):
        raise VlmtuneError("not a complete checkpoint", file=path, expected="…/step-NNNNNN")
    state = read_state(path)
    with _damage_told(path):
        return Checkpoint(
            state=state,
            tensors=load_file(path / "tensors.safetensors"),
            optimizer=torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"),
            rng=torch.load(path / "rng.pt", weights_only=True, map_location="cpu"),
        )


def read_state(path: Path) -> TrainState:
    """Where the run stood at a complete checkpoint."""
    with _damage_told(path):
        values = json.loads((path / "state.json").read_text())
        best = values.pop("best", None)
        return TrainState(**values, best=None if best is None else Best(**best))


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """What reading a file of a checkpoint raises, as an error that says what to do."""
    try:
        yield
    # A cut file is an EOFError, UnpicklingError or RuntimeError to torch.load, by where it is cut.
    except (
        *(OSError, SafetensorError, EOFError, pickle.UnpicklingError, RuntimeError),
        *(ValueError, TypeError, AttributeError),
    ) as error:
        text = str(error).strip()
        raise VlmtuneError(
            "the checkpoint is damaged",
            file=path,
            got=text.splitlines()[0][:200] if text else type(error).__name__,
            do="go on from another one with --resume DIR, or start over with --resume never",
        ) from error


def check_fingerprint(saved: Mapping[str, Any], now: Mapping[str, Any], *, path: Path) -> None:
    """Raise `VlmtuneError` naming every recipe key or data file that changed since the stop."""
    changed = sorted(k for k in saved.keys() | now.keys() if saved.get(k) != now.get(k))
    if changed:
        details = "; ".join(f"{k}: {saved.get(k)!r} -> {now.get(k)!r}" for k in changed[:5])
        raise VlmtuneError(
            f"cannot resume: {', '.join(changed)} changed since this checkpoint",
            file=path,
            got=details,
            do="restore them, or start over with --resume never or another output_dir",
        )


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for path in folder.rglob("*"):
        sync_path(path)
    sync_path(folder)
