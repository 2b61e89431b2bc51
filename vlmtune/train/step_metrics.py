"""The figures of a launched step: on a CUDA device they are read later, so that nothing waits.

    train_step -> AsyncStepMetrics -> read -> StepResult

Read at once, `loss` and gradient are checked before the update. Read late (`should_defer_sync`),
the step is updated first, and checked when it is read: after the next step was launched at the
latest, and before anything is logged, evaluated or saved. A step that is not finite ends the run
either way, and no checkpoint ever holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vlmtune.data.batches import share_mark
from vlmtune.errors import VlmtuneError
from vlmtune.train.feed import SkippedSample, StepBatch
from vlmtune.train.runtime import CudaEvent, to_device_async, to_host


@dataclass
class StepResult:
    """What a step did. `loss` is nats per term, over all processes, each counting by its weight;
    `weight` is that of all; `was_skipped`: fp16's loss scaler threw the step away; `stop`: some
    process was asked to stop."""

    loss: float
    penalty: float | None
    grad_norm: float
    num_terms: int
    weight: float
    num_left_out: int
    was_skipped: bool
    stop: bool
    part_grad_norms: dict[str, float] = field(default_factory=dict)


def should_defer_sync(device: torch.device) -> bool:
    """Whether reading a figure on `device` makes the host wait for all that is queued there."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Counts:
    """A step's, over all processes: numbers, or (5,) on the device where they are read late."""

    values: Sequence[float] | Tensor

    @property
    def divisor(self) -> float | Tensor:
        """What the sum of the terms is divided by: their weight, 1 where nothing weighs."""
        weight = self.values[0]
        if isinstance(weight, Tensor):
            return torch.where(weight == 0, torch.ones_like(weight), weight).float()
        return weight or 1.0


def counts_of(local: Sequence[float], accelerator: Accelerator, *, defer_sync: bool) -> Counts:
    """The sums of `local` over all processes: weight, terms, left out, stops, and the shares'
    marks. A collective."""
    if accelerator.num_processes == 1:
        return Counts(local)
    sums = accelerator.reduce(to_device_async(local, accelerator.device), "sum")
    return Counts(sums if defer_sync else sums.tolist())


class AsyncStepMetrics:
    """Step number `step`, launched from `batch`; its figures may still be on the device.

    `losses` are the weighted sums of this process's micro-batches. `left_out`: what this process
    left out. `adapter_log`: what the adapter has to log.
    """

    def __init__(
        self,
        step: int,
        *,
        batch: StepBatch,
        counts: Counts,
        losses: Tensor,
        accelerator: Accelerator,
    ) -> None:
        self.step = step
        self.left_out: list[SkippedSample] = batch.left_out
        self.adapter_log: dict[str, object] = {}
        self._mark = share_mark(range(batch.num_step_samples))
        self._sample_ids = [micro_batch.sample_ids for micro_batch in batch.micro_batches]
        self._counts = counts.values
        self._losses = losses
        self._accelerator = accelerator
        self._figures: dict[str, Tensor] = {}
        self._part_norms: dict[str, Tensor] = {}
        self._arrival: CudaEvent | None = None

    def send(
        self,
        *,
        total: Tensor,
        grad_norm: Tensor,
        penalty: Tensor | None,
        part_norms: Mapping[str, Tensor],
        skipped: Tensor | None,
    ) -> None:
        """Start to copy the figures to the host. `skipped`: whether fp16's loss scaler throws the
        step away; None without one."""
        figures = {"total": total, "grad_norm": grad_norm}
        if penalty is not None:
            figures["penalty"] = penalty
        if skipped is not None:
            figures["skipped"] = skipped
        if isinstance(self._counts, Tensor):
            self._counts = to_host(self._counts)
        self._figures = {name: to_host(value) for name, value in figures.items()}
        self._part_norms = {part: to_host(norm) for part, norm in part_norms.items()}
        self._arrival = CudaEvent(self._accelerator.device)

    def read(self) -> StepResult:
        """The figures, once they are there.

        Raises `VlmtuneError` where the loss or the gradient is not finite, naming the step and its
        samples, or where the samples were not shared out one by one; on all processes alike.
        """
        assert self._arrival is not None, "sent before it is read"
        self._arrival.wait()
        self.check_shares()
        self.check("loss", self._figures["total"])
        if "skipped" not in self._figures:
            self.check("gradient", self._figures["grad_norm"])
        weight, num_terms, num_left_out, stops, _ = self._read_counts()
        values = {name: value.item() for name, value in self._figures.items()}
        return StepResult(
            loss=values["total"] / (weight or 1.0),
            penalty=values.get("penalty"),
            grad_norm=values["grad_norm"],
            num_terms=int(num_terms),
            weight=weight,
            num_left_out=int(num_left_out),
            was_skipped=bool(values.get("skipped", False)),
            stop=bool(stops),
            part_grad_norms={part: norm.item() for part, norm in self._part_norms.items()},
        )

    def check_shares(self) -> None:
        """Raise `VlmtuneError` where some sample of the step was trained on twice, or never: the
        processes split it by what they could read."""
        if self._read_counts()[-1] != self._mark:
            raise VlmtuneError(
                f"step {self.step}: the processes do not agree on who trains on which sample; "
                "no checkpoint holds this step",
                expected="the same data and picture files, readable for every process",
                do="look for files that one machine lacks, and go on with --resume auto",
            )

    def _read_counts(self) -> Sequence[float]:
        if isinstance(self._counts, Tensor):
            counts: list[float] = self._counts.tolist()
            return counts
        return self._counts

    def check(self, what: str, value: Tensor) -> None:
        """Raise `VlmtuneError` where `value` is not finite. Every process gets here in the same
        step; the suspects of all are named (a collective)."""
        if torch.isfinite(value):
            return
        finite = torch.isfinite(self._losses).tolist()
        suspects = [ids for ids, ok in zip(self._sample_ids, finite, strict=True) if not ok]
        found = gather_object([name for name in chain(*suspects) if name])
        where = "micro-batch" if found else "step"
        ids = found or gather_object([name for name in chain(*self._sample_ids) if name])
        shown = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        raise VlmtuneError(
            f"step {self.step}: the {what} is not finite; no checkpoint holds this step",
            got=f"samples of the {where}: {shown}",
            do="look at these samples; lower train.learning_rate or set train.max_grad_norm",
        )
