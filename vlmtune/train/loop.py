"""The training loop.

    evaluate before -> for each optimizer step:
        fetch -> learning rate -> train_step -> evaluate -> log -> save -> better still to come?

Everything that decides a step's result is a pure function of (seed, step, data) or is in the
checkpoint; that is why a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn

from vlmtune.errors import VlmtuneError
from vlmtune.recipe.schema import EvalSection, Recipe, TrainSection
from vlmtune.train.best import Best, is_over, updated
from vlmtune.train.checkpoint import (
    Checkpoint,
    TrainState,
    checkpoint_path,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from vlmtune.train.feed import StepData
from vlmtune.train.interrupt import StopSignal
from vlmtune.train.optim import learning_rate_factor, resolve_count, set_learning_rate
from vlmtune.train.runtime import peak_memory_bytes
from vlmtune.train.skips import SkipLedger
from vlmtune.train.step import Method, Objective, StepResult, train_step
from vlmtune.train.tracker import Tracker

Progress = Callable[[int, int], None]
"""Told how many of how many samples are done."""
Evaluate = Callable[[int, Progress], dict[str, float]]
"""The figures of an evaluation at an optimizer step, by name; a collective."""
OBJECTIVE = "objective."
"""How the names of the objective's tensors start in a checkpoint."""
HELD_OUT = "eval_"
"""How the names of figures on `data.eval` start."""


class TrainedMethod(Method, Protocol):
    """An adapter method, as the loop needs it: the step's part and its state."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Schedule:
    """All counts in optimizer steps, but `patience`, in evaluations. `best_metric` is the figure
    by which the result is chosen, if any; `evaluates_before`: once before the first step too."""

    total_steps: int
    warmup_steps: int
    eval_every: int
    save_every: int
    evaluates_before: bool
    best_metric: str | None
    patience: int | None

    @classmethod
    def of(cls, section: TrainSection, evaluation: EvalSection, total_steps: int) -> Schedule:
        return cls(
            total_steps=total_steps,
            warmup_steps=resolve_count(section.warmup, total_steps, whole=False),
            eval_every=resolve_count(section.eval_every, total_steps, whole=True),
            save_every=resolve_count(section.save_every, total_steps, whole=True),
            evaluates_before=evaluation.before or evaluation.guard is not None,
            best_metric=evaluation.best_metric,
            patience=evaluation.patience,
        )


@dataclass
class Trainee:
    """What is trained, and by what. `parameters` are the trained tensors by name."""

    forward: nn.Module
    method: TrainedMethod
    parameters: Mapping[str, nn.Parameter]
    part_of_name: Mapping[str, str]
    optimizer: AcceleratedOptimizer
    objective: Objective

    def state_dict(self) -> dict[str, Tensor]:
        """The method's tensors, and what the objective learns beside them."""
        own = {OBJECTIVE + name: p.detach() for name, p in self.objective.tensors.items()}
        return self.method.state_dict() | own

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.objective.tensors.items():
                parameter.copy_(state[OBJECTIVE + name])
        method = {name: t for name, t in state.items() if not name.startswith(OBJECTIVE)}
        self.method.load_state_dict(method)


@dataclass
class TrainResult:
    """Figures of this session. `terms` counts those of the loss (supervised tokens, or pairs).

    `paused_seconds`: of `seconds`, those spent on evaluation and checkpoints. `notes`: samples that
    were changed to fit, by what was done. `stopped_by`: the exit code of a stop by signal. `best`:
    the best evaluation, where the recipe names a metric to choose by; the trained tensors are then
    those of its step.
    """

    steps: int
    samples: int = 0
    loss: float = float("nan")
    seconds: float = 0.0
    paused_seconds: float = 0.0
    terms: int = 0
    peak_memory_bytes: int = 0
    skipped: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    stopped_by: int | None = None
    best: Best | None = None


@dataclass
class _Window:
    """Sums since the last logged line."""

    started: float = field(default_factory=time.monotonic)
    loss_sum: float = 0.0
    num_terms: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_images: int = 0
    wait_seconds: float = 0.0
    num_scaler_skips: int = 0


def is_finished(state: TrainState, recipe: Recipe, total_steps: int) -> bool:
    """Whether a run in this state has no step left to do."""
    return state.step == total_steps or is_over(state.best, recipe.eval.patience)


def train(
    trainee: Trainee,
    *,
    section: TrainSection,
    schedule: Schedule,
    make_steps: Callable[[int, int], Iterator[StepData]],
    accelerator: Accelerator,
    folder: Path,
    fingerprint: dict[str, Any],
    skips: SkipLedger,
    evaluate: Evaluate | None,
    resume: Checkpoint | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train from the step after `resume` (or 1) to the last; runs on every process.

    `make_steps(first, last)` yields this process's data. `evaluate` is a collective and returns the
    metrics to log. Raises `VlmtuneError` for a non-finite loss, too many bad samples, a full disk.
    """
    first, best = 1, None
    if resume is not None:
        first, best = resume.state.step + 1, resume.state.best
        restore(trainee, resume, accelerator)
    main = accelerator.is_main_process
    result = TrainResult(steps=first - 1, skipped=skips.num_left_out)
    window = _Window()
    notes: set[tuple[str, str]] = set()
    begin = time.monotonic()
    with (
        StopSignal() as stop,
        Tracker(
            folder,
            total_steps=schedule.total_steps,
            first_step=first,
            quiet=quiet,
            active=main,
        ) as tracker,
    ):
        if evaluate is not None and schedule.evaluates_before and first == 1:
            tracker.log(0, _evaluated(evaluate, trainee.forward, 0, tracker))
            result.paused_seconds = time.monotonic() - begin
            window = _Window()
        # A run that had stopped for want of anything better has no step left to do.
        last = first - 1 if is_over(best, schedule.patience) else schedule.total_steps
        steps = make_steps(first, last)
        for step in range(first, last + 1):
            waited = time.monotonic()
            data = next(steps)
            window.wait_seconds += time.monotonic() - waited
            factor = learning_rate_factor(
                step,
                total_steps=schedule.total_steps,
                warmup_steps=schedule.warmup_steps,
                schedule=section.schedule,
            )
            rates = set_learning_rate(trainee.optimizer.optimizer, factor)
            is_last = step == schedule.total_steps
            due = step % section.log_every == 0 or is_last
            done = train_step(
                trainee.forward,
                step=step,
                data=data,
                objective=trainee.objective,
                method=trainee.method,
                parameters=trainee.parameters,
                part_of_name=trainee.part_of_name,
                optimizer=trainee.optimizer,
                accelerator=accelerator,
                max_grad_norm=section.max_grad_norm,
                stop_requested=stop.received is not None,
                log_parts=due,
            )
            if done.num_left_out:
                skips.add(gather_object(data.left_out), write=main)
            notes.update(data.notes)
            _add(window, data, done, accelerator.num_processes)
            result.steps = step
            result.samples += data.num_step_samples - done.num_left_out
            result.terms += done.num_terms
            result.loss = window.loss_sum / max(1, window.num_terms)
            training_seconds = time.monotonic() - begin - result.paused_seconds
            tracker.advance(step, result.loss, result.samples / training_seconds)
            line: dict[str, Any] = dict(done.method_log)
            if due:
                line = _line(window, done, rates, data, accelerator, trainee.objective) | line
                window = _Window()
            paused = time.monotonic()
            if evaluate is not None and (step % schedule.eval_every == 0 or is_last):
                values = _evaluated(evaluate, trainee.forward, step, tracker)
                line |= values
                best = _best_after(best, schedule.best_metric, step, values)
            if line:
                tracker.log(step, line)
            is_best = best is not None and best.step == step
            over = is_over(best, schedule.patience)
            if step % schedule.save_every == 0 or is_last or done.stop or is_best or over:
                state = TrainState(
                    step, accelerator.num_processes, fingerprint, skips.as_list(), best
                )
                _save(trainee, state, accelerator, folder, section.keep_checkpoints)
            if done.stop and not is_last:
                result.stopped_by = stop.exit_code
                break
            if over and not is_last:
                tracker.say(
                    f"stopping after step {step}: no better {schedule.best_metric} in "
                    f"{schedule.patience} evaluations"
                )
                break
            # Evaluating and saving are no part of the training speed.
            window.started += time.monotonic() - paused
            result.paused_seconds += time.monotonic() - paused
    if best is not None and result.stopped_by is None:
        result.best = best
        if best.step != result.steps:
            chosen = load_checkpoint(checkpoint_path(folder / "checkpoints", best.step))
            trainee.load_state_dict(chosen.tensors)
    result.seconds = time.monotonic() - begin
    result.skipped = skips.num_left_out
    result.notes = dict(Counter(note for note, _ in set(gather_object(sorted(notes)))))
    result.peak_memory_bytes = peak_memory_bytes(accelerator.device)
    return result


def _add(window: _Window, data: StepData, done: StepResult, num_processes: int) -> None:
    window.loss_sum += done.loss * done.num_terms
    window.num_terms += done.num_terms
    window.num_samples += data.num_step_samples - done.num_left_out
    # Of this process, times their number: an estimate that costs no collective.
    window.num_tokens += num_processes * sum(b.num_tokens for b in data.micro_batches)
    window.num_images += num_processes * sum(b.num_images for b in data.micro_batches)
    window.num_scaler_skips += done.was_skipped


def _line(
    window: _Window,
    done: StepResult,
    rates: dict[str, float],
    data: StepData,
    accelerator: Accelerator,
    objective: Objective,
) -> dict[str, Any]:
    seconds = time.monotonic() - window.started
    line: dict[str, Any] = {
        "epoch": data.epoch,
        "loss": window.loss_sum / max(1, window.num_terms),
        "learning_rate": rates,
        "grad_norm": {"total": done.grad_norm, **done.part_grad_norms},
        objective.unit: window.num_terms,
        **objective.log(),
        "samples_per_second": window.num_samples / seconds,
        "tokens_per_second": window.num_tokens / seconds,
        "images_per_second": window.num_images / seconds,
        "data_wait_fraction": window.wait_seconds / seconds,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
    }
    if done.penalty is not None:
        line["orthogonal_penalty"] = done.penalty
    if window.num_scaler_skips:
        line["steps_skipped_by_loss_scaler"] = window.num_scaler_skips
    return line


def _evaluated(
    evaluate: Evaluate, forward: nn.Module, step: int, tracker: Tracker
) -> dict[str, float]:
    """The figures at `step`; modes and random state are as before."""
    before = random_state()
    forward.eval()
    try:
        return evaluate(step, tracker.evaluating)
    finally:
        forward.train()
        restore_random_state(before)


def _best_after(
    best: Best | None, metric: str | None, step: int, values: Mapping[str, float]
) -> Best | None:
    if metric is None:
        return None
    own = {n.removeprefix(HELD_OUT): v for n, v in values.items() if n.startswith(HELD_OUT)}
    return updated(best, metric=metric, step=step, values=own)


def _save(
    trainee: Trainee, state: TrainState, accelerator: Accelerator, folder: Path, keep: int
) -> None:
    rng = gather_object([random_state()])
    if accelerator.is_main_process:
        optimizer: dict[str, Any] = {"optimizer": trainee.optimizer.state_dict()}
        if accelerator.scaler is not None:
            optimizer["scaler"] = accelerator.scaler.state_dict()
        checkpoint = Checkpoint(state, trainee.state_dict(), optimizer, rng)
        save_checkpoint(folder / "checkpoints", checkpoint, keep=keep)
    accelerator.wait_for_everyone()


def restore(trainee: Trainee, checkpoint: Checkpoint, accelerator: Accelerator) -> None:
    """Put a checkpoint's tensors, optimizer and random state in place."""
    trainee.load_state_dict(checkpoint.tensors)
    trainee.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(checkpoint.optimizer["scaler"])
    if len(checkpoint.rng) != accelerator.num_processes:
        raise VlmtuneError(
            "cannot resume on another number of processes",
            got=accelerator.num_processes,
            expected=len(checkpoint.rng),
            do="launch as before, or start over with --resume never",
        )
    restore_random_state(checkpoint.rng[accelerator.process_index])
