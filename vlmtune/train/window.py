"""What is summed up between two logged lines, and the line that comes of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from vlmtune.train.feed import StepData
from vlmtune.train.pending import StepResult
from vlmtune.train.runtime import peak_memory_bytes
from vlmtune.train.step import Objective


@dataclass
class Window:
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

    def launched(self, data: StepData, *, num_processes: int) -> None:
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
        accelerator: Accelerator,
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
            "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        }
        if done.penalty is not None:
            line["orthogonal_penalty"] = done.penalty
        if self.num_scaler_skips:
            line["steps_skipped_by_loss_scaler"] = self.num_scaler_skips
        return line
