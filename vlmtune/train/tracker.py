"""What a run writes down and shows: `metrics.jsonl`, TensorBoard, and the progress on stderr.

A terminal gets a progress bar with loss, speed and time left, and a line above it for each
evaluation; a pipe gets a plain line for each logged step. Only the main process has a tracker that
does anything.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vlmtune.files import write_file
from vlmtune.train.feed import StepBatch
from vlmtune.train.runtime import peak_memory_bytes
from vlmtune.train.state import Objective
from vlmtune.train.step_metrics import StepResult

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def finite_or_null(value: object) -> object:
    """`value` with every NaN and infinity in it as None. Python's own JSON would hold the words
    `NaN` and `Infinity`, on which other readers stop."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class MetricsAccumulator:
    """Sums since the last logged line."""

    started: float = field(default_factory=time.monotonic)
    loss_sum: float = 0.0
    num_terms: int = 0
    weight: float = 0.0
    num_samples: int = 0
    num_tokens: int = 0
    num_images: int = 0
    wait_seconds: float = 0.0
    num_scaler_skips: int = 0

    @property
    def loss(self) -> float:
        return self.loss_sum / (self.weight or 1.0)

    def launched(self, data: StepBatch, *, num_processes: int) -> None:
        """Count a step's data, all but what was left out of it."""
        self.num_samples += data.num_step_samples
        # Of this process, times their number: an estimate that costs no collective.
        self.num_tokens += num_processes * sum(b.num_tokens for b in data.micro_batches)
        self.num_images += num_processes * sum(b.num_images for b in data.micro_batches)

    def add(self, done: StepResult) -> None:
        """Count what a launched step did."""
        self.loss_sum += done.loss * done.weight
        self.num_terms += done.num_terms
        self.weight += done.weight
        self.num_samples -= done.num_left_out
        self.num_scaler_skips += done.was_skipped

    def line(
        self,
        done: StepResult,
        rates: dict[str, float],
        *,
        epoch: float,
        objective: Objective,
        device: torch.device,
    ) -> dict[str, Any]:
        """What `metrics.jsonl` holds of a logged step, `done`."""
        seconds = time.monotonic() - self.started
        line: dict[str, Any] = {
            "epoch": epoch,
            "loss": self.loss,
            "learning_rate": rates,
            "grad_norm": {"total": done.grad_norm, **done.part_grad_norms},
            objective.unit: self.num_terms,
            **objective.log(),
            "samples_per_second": self.num_samples / seconds,
            "tokens_per_second": self.num_tokens / seconds,
            "images_per_second": self.num_images / seconds,
            "data_wait_fraction": self.wait_seconds / seconds,
            "peak_memory_bytes": peak_memory_bytes(device),
        }
        if done.penalty is not None:
            line["orthogonal_penalty"] = done.penalty
        if self.num_scaler_skips:
            line["steps_skipped_by_loss_scaler"] = self.num_scaler_skips
        return line


EVALUATED = ("eval_", "guard_")
"""How the names of an evaluation's figures start."""


def board_writer(folder: Path, first_step: int) -> SummaryWriter:
    """What writes TensorBoard's events into `folder`; those from `first_step` on are void.

    TensorBoard loads TensorFlow where that is installed, seconds and hundreds of megabytes for
    files that it can write itself: unless there is a module of the name below.
    """
    without_tensorflow = "tensorboard.compat.notf"
    sys.modules.setdefault(without_tensorflow, ModuleType(without_tensorflow))
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step)


class Tracker:
    """Logs of one run. Used as a context manager; `active=False` writes and shows nothing."""

    def __init__(
        self, folder: Path, *, total_steps: int, first_step: int, quiet: bool, active: bool
    ) -> None:
        self.active = active
        self.total_steps = total_steps
        self._path = folder / "metrics.jsonl"
        self._console = Console(stderr=True, quiet=quiet)
        self._plain = not sys.stderr.isatty() and not quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._start = time.monotonic()
        self._first_step = first_step
        if not active:
            return
        drop_lines_from(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = board_writer(folder / "tensorboard", first_step)
        if sys.stderr.isatty() and not quiet:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self._console,
            )

    def __enter__(self) -> Tracker:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                "train", total=self.total_steps, completed=self._first_step - 1, status=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.active:
            self._file.close()
            self._board.close()

    def advance(self, step: int, loss: float, samples_per_second: float) -> None:
        """Move the progress bar; costs nothing in a pipe."""
        if self._bar is not None and self._task is not None:
            status = f"loss {loss:.4f}  {samples_per_second:.1f} samples/s"
            self._bar.update(self._task, completed=step, status=status)

    def evaluating(self, done: int, total: int) -> None:
        """Show how far an evaluation is on the progress bar; costs nothing in a pipe."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, status=f"evaluating {done}/{total}")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl` and the numbers in it to TensorBoard."""
        if not self.active:
            return
        self._file.write(json.dumps(finite_or_null({"step": step, **values})) + "\n")
        self._file.flush()
        for name, value in flatten(values).items():
            self._board.add_scalar(name, value, step)
        if self._plain or any(name.startswith(EVALUATED) for name in values):
            self.say(self._line(step, values))

    def say(self, text: str) -> None:
        """A line for the person watching, above the progress bar."""
        if self.active:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, step: int, values: dict[str, Any]) -> str:
        shown = [f"step {step}/{self.total_steps}"]
        forms = {
            "loss": "{:.4f}",
            "orthogonal_penalty": "{:.4f}",
            "grad_norm": "{:.3f}",
            "samples_per_second": "{:.1f}",
        } | {name: "{:.4f}" for name in values if name.startswith(EVALUATED)}
        for name, form in forms.items():
            value = values.get(name)
            if name == "grad_norm" and isinstance(value, dict):
                value = value["total"]
            if isinstance(value, (int, float)):
                shown.append(f"{name} {form.format(value)}")
        if step >= self._first_step:
            done = step - self._first_step + 1
            left = (time.monotonic() - self._start) / done * (self.total_steps - step)
            shown.append(f"left {left / 60:.1f} min")
        return "  ".join(shown)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested dict under `a/b` names; other values are left out."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            numbers |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[f"{prefix}{name}"] = float(value)
    return numbers


def drop_lines_from(path: Path, first_step: int) -> None:
    """Remove logged steps that a run is about to do again, and a half-written last line; the
    evaluation before the first step (step 0) too where it starts anew."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if max(1, json.loads(line)["step"]) < first_step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_file(path, "".join(kept))
