"""What a run writes down and shows: `metrics.jsonl`, TensorBoard, and the progress on stderr.

A terminal gets a progress bar with loss, speed and time left, and a line above it for each
evaluation; a pipe gets a plain line for each logged step. Only the main process has a tracker that
does anything.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vlmtune.train.finite import finite_or_null

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
    path.write_text("".join(kept), encoding="utf-8")
