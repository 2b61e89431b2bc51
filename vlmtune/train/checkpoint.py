"""Checkpoints: what they hold, and how they are written, read and removed.

    checkpoints/
      step-000100/
        tensors.safetensors   every trained tensor at full size, and the adapter method's state
        optimizer.pt          the optimizer's state and, in fp16, the loss scaler's
        rng.pt                random state of every process
        state.json            step, fingerprint of recipe and data, number of processes
      .writing-step-000150/   an unfinished one; removed by the next save

A reader only looks at `step-*`; a kill at any moment leaves the last complete one in place.

    step -> copies of the tensors and the optimizer's state -> thread: write, sync, rename, prune
         -> training goes on; the next save, and the end, wait for the thread

The thread does what `save_checkpoint` does, so that a kill leaves complete checkpoints only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmtune.data.dataset import cache_dir_of, content_hash, media_policy_of
from vlmtune.data.stream import stream_identity
from vlmtune.errors import VlmtuneError
from vlmtune.files import WRITING, whole_folder
from vlmtune.recipe.rules import values_of_steps
from vlmtune.recipe.schema import Recipe, is_lower_better
from vlmtune.train.runtime import CudaEvent, to_host


@dataclass(frozen=True)
class Best:
    """`value` of `metric` at optimizer step `step`; `num_since`: evaluations after it."""

    metric: str
    step: int
    value: float
    num_since: int = 0


def best_by(best: Best | None, metric: str | None) -> Best | None:
    """`best` where it is one by `metric`. Of another metric (the recipe was changed between a stop
    and its resume) it says nothing."""
    return best if best is not None and best.metric == metric else None


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether `value` beats `than`; NaN never does, and everything else beats NaN."""
    if math.isnan(value) or math.isnan(than):
        return not math.isnan(value)
    return value < than if is_lower_better(metric) else value > than


def updated(best: Best | None, *, metric: str, step: int, values: Mapping[str, float]) -> Best:
    """The best after an evaluation at `step`. Raises VlmtuneError where it has no such metric."""
    if metric not in values:
        raise VlmtuneError(
            "the evaluation on data.eval has no metric called as eval.best_metric says",
            got=metric,
            expected=" or ".join(values),
        )
    value = values[metric]
    best = best_by(best, metric)
    if best is None or is_better(metric, value, best.value):
        return Best(metric, step, value)
    return replace(best, num_since=best.num_since + 1)


def is_over(best: Best | None, patience: int | None) -> bool:
    """Whether `patience` evaluations in a row brought nothing better."""
    return best is not None and patience is not None and best.num_since >= patience


def fingerprint_of(recipe: Recipe, data_hashes: dict[str, str]) -> dict[str, Any]:
    """Every recipe key and data file that decides a step's result."""
    contents = {f"content of {name}": digest for name, digest in data_hashes.items()}
    return values_of_steps(recipe) | contents


def data_hashes_of(recipe: Recipe) -> dict[str, str]:
    """What the training files are told by: their content; of streamed ones size and time."""
    if recipe.data.streaming:
        return stream_identity(recipe.data.train)
    cache_dir = cache_dir_of(media_policy_of(recipe.data))
    return {str(k): v for k, v in content_hash(recipe.data.train, cache_dir=cache_dir).items()}


@dataclass(frozen=True)
class CheckpointMeta:
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
    state: CheckpointMeta
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
    try:
        for old in folder.glob(f"{WRITING}*"):
            shutil.rmtree(old)
        with whole_folder(final) as writing:
            tensors = {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}
            save_file(tensors, writing / "tensors.safetensors")
            torch.save(checkpoint.optimizer, writing / "optimizer.pt")
            torch.save(checkpoint.rng, writing / "rng.pt")
            (writing / "state.json").write_text(json.dumps(asdict(checkpoint.state), indent=1))
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError from its zip writer.
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


def read_state(path: Path) -> CheckpointMeta:
    """Where the run stood at a complete checkpoint."""
    with _damage_told(path):
        values = json.loads((path / "state.json").read_text())
        best = values.pop("best", None)
        return CheckpointMeta(**values, best=None if best is None else Best(**best))


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
            do="resume from another one with --resume DIR, or start over with --resume never",
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


log = logging.getLogger("vlmtune")

COPY_FRACTION = 0.25
"""Of the host's free memory: a state that is larger is written without a copy, while training
waits."""


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with every tensor copied to the host: training on does not change it."""
    copies: dict[int, Tensor] = {}
    copy = replace(
        checkpoint,
        tensors=_copied(checkpoint.tensors, copies),
        optimizer=_copied(checkpoint.optimizer, copies),
    )
    if torch.cuda.is_available():
        CudaEvent(torch.device("cuda")).wait()
    return copy


def state_bytes(checkpoint: Checkpoint) -> int:
    """The size of a copy of the checkpoint's tensors."""
    found = _tensors([checkpoint.tensors, checkpoint.optimizer])
    return sum({id(t): t.nbytes for t in found}.values())


class CheckpointWriter:
    """Writes into `folder`, one checkpoint at a time, and keeps what `save_checkpoint` keeps.

    Used as a context manager: what is being written is finished before the block is left, also on
    an error. An error of the thread is raised by the next call, at the latest on leaving.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._has_said = False

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if value is None:
            self.wait()
        elif self._writing is not None and (error := self._writing.exception()) is not None:
            log.error("%s", error)

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write `checkpoint`, once the one before is there; its tensors may change after.

        Raises `VlmtuneError` where the disk refused the one before.
        """
        self.wait()
        size, free = state_bytes(checkpoint), psutil.virtual_memory().available
        if size > COPY_FRACTION * free:
            self._say_waiting(size, free)
            save_checkpoint(self._folder, checkpoint, keep=self._keep)
            return
        copy = copied(checkpoint)
        self._writing = self._thread.submit(save_checkpoint, self._folder, copy, keep=self._keep)

    def check(self) -> None:
        """Raise the `VlmtuneError` of a write that has failed; does not wait for one that goes
        on."""
        if self.is_idle():
            self.wait()

    def is_idle(self) -> bool:
        """Whether nothing is being written."""
        return self._writing is None or self._writing.done()

    def wait(self) -> None:
        """Return when everything is on the disk. Raises `VlmtuneError` where it refused."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _say_waiting(self, size: int, free: int) -> None:
        if not self._has_said:
            self._has_said = True
            log.info(
                "a checkpoint holds %.1f GB and %.1f GB of memory are free: training waits for "
                "each to be written",
                size / 1e9,
                free / 1e9,
            )


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """A tensor that occurs twice (the optimizer's tables) is copied once."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = to_host(value)
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: _copied(item, copies) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, copies) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
