"""The training loop.

    restore, first step's data -> prepare the folder -> evaluate before -> for each optimizer step:
        fetch -> learning rate -> train_step -> read -> evaluate -> log -> save -> better to come?

Everything that decides a step's result is a pure function of (seed, step, data) or is in the
checkpoint; that is why a resumed run equals an uninterrupted one. Where reading a figure would make
the host wait (CUDA), a step's are read after the next was launched, unless something is due at it.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from vlmtune.data.stream import StreamCursor
from vlmtune.recipe.schema import EvalSection, Recipe, TrainSection
from vlmtune.train.checkpoint import (
    Best,
    Checkpoint,
    CheckpointMeta,
    CheckpointWriter,
    best_by,
    checkpoint_path,
    is_over,
    load_checkpoint,
    random_state,
    restore_random_state,
    updated,
)
from vlmtune.train.feed import StepBatch, translate_worker_errors
from vlmtune.train.optim import learning_rate_factor, resolve_count, set_learning_rate
from vlmtune.train.run_folder import SkipLog
from vlmtune.train.runtime import StopSignal, peak_memory_bytes
from vlmtune.train.state import TrainState, restore, save
from vlmtune.train.step import train_step
from vlmtune.train.step_metrics import AsyncStepMetrics, StepResult, should_defer_sync
from vlmtune.train.tracker import MetricsAccumulator, Tracker

Progress = Callable[[int, int], None]
"""Told how many of how many samples are done."""
Evaluate = Callable[[int, Progress], dict[str, float]]
"""The figures of an evaluation at an optimizer step, by name; a collective."""
EVAL_PREFIX = "eval_"
"""How the names of figures on `data.eval` start."""


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


def is_finished(state: CheckpointMeta, recipe: Recipe, total_steps: int) -> bool:
    """Whether a run in this state has no step left to do."""
    best = best_by(state.best, recipe.eval.best_metric)
    return state.step == total_steps or is_over(best, recipe.eval.patience)


def train(
    trainee: TrainState,
    *,
    section: TrainSection,
    schedule: Schedule,
    make_steps: Callable[[int, int], Iterator[StepBatch]],
    prepare_folder: Callable[[], None],
    accelerator: Accelerator,
    folder: Path,
    fingerprint: dict[str, Any],
    skips: SkipLog,
    evaluate: Evaluate | None,
    resume: Checkpoint | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train from the step after `resume` (or 1) to the last; runs on every process.

    `make_steps(first, last)` yields this process's data. `prepare_folder` is called before anything
    is written, once the checkpoint is in place and the first step's data is there: a collective.
    `evaluate` is one too and returns the metrics to log. Raises `VlmtuneError` for a checkpoint
    that does not fit, a non-finite loss, too many bad samples, a full disk, a worker process that
    is gone.
    """
    first, best = 1, None
    if resume is not None:
        first, best = resume.state.step + 1, best_by(resume.state.best, schedule.best_metric)
        restore(trainee, resume, accelerator)
    # A run that had stopped for want of anything better has no step left to do.
    last = first - 1 if is_over(best, schedule.patience) else schedule.total_steps
    began = time.monotonic()
    with translate_worker_errors():
        steps = _with_first_made(make_steps(first, last))
    waited = time.monotonic() - began
    prepare_folder()
    began = time.monotonic() - waited
    with (
        StopSignal() as stop,
        CheckpointWriter(folder / "checkpoints", keep=section.keep_checkpoints) as writer,
        Tracker(
            folder,
            total_steps=schedule.total_steps,
            first_step=first,
            quiet=quiet,
            active=accelerator.is_main_process,
        ) as tracker,
    ):
        loop = _Loop(
            trainee,
            section=section,
            schedule=schedule,
            accelerator=accelerator,
            folder=folder,
            fingerprint=fingerprint,
            skips=skips,
            evaluate=evaluate,
            stop=stop,
            writer=writer,
            tracker=tracker,
            defer_sync=should_defer_sync(accelerator.device),
            result=TrainResult(steps=first - 1, best=best),
            window=MetricsAccumulator(started=began, wait_seconds=waited),
            began=began,
        )
        with translate_worker_errors():
            loop.run(range(first, last + 1), steps)
    return loop.finish()


def _with_first_made(steps: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """The same steps, the first one made already: what is wrong with it is raised here."""
    return itertools.chain(list(itertools.islice(steps, 1)), steps)


@dataclass
class _Loop:
    """A session of training: what it works with, and how far it has come."""

    trainee: TrainState
    section: TrainSection
    schedule: Schedule
    accelerator: Accelerator
    folder: Path
    fingerprint: dict[str, Any]
    skips: SkipLog
    evaluate: Evaluate | None
    stop: StopSignal
    writer: CheckpointWriter
    tracker: Tracker
    defer_sync: bool
    result: TrainResult
    window: MetricsAccumulator
    began: float
    pending: deque[AsyncStepMetrics] = field(default_factory=deque)
    notes: set[tuple[str, str, int]] = field(default_factory=set)
    cursor: StreamCursor | None = None

    def run(self, numbers: range, steps: Iterator[StepBatch]) -> None:
        """The steps of these numbers, up to the last or to a reason to stop."""
        schedule = self.schedule
        if self.evaluate is not None and schedule.evaluates_before and numbers.start == 1:
            paused = time.monotonic()
            values = self._evaluated(self.evaluate, 0)
            self.tracker.log(0, values)
            if any(name.startswith(EVAL_PREFIX) for name in values):
                # A name that is no figure is said now, not after the first stretch of training.
                _best_after(None, schedule.best_metric, 0, values)
            self._pause_since(paused)
        for step in numbers:
            self.writer.check()
            waited = time.monotonic()
            data = next(steps)
            self.window.wait_seconds += time.monotonic() - waited
            line, stops = self._train(step, data)
            paused = time.monotonic()
            goes_on = self._evaluate_log_save(step, line, stops=stops)
            self._pause_since(paused)
            if not goes_on:
                break

    def finish(self) -> TrainResult:
        """The figures of the session; the trained tensors are the best step's where one is
        chosen. A collective."""
        result = self.result
        self.accelerator.wait_for_everyone()  # the main process has written its last checkpoint
        if result.stopped_by is not None:
            result.best = None
        if result.best is not None and result.best.step != result.steps:
            path = checkpoint_path(self.folder / "checkpoints", result.best.step)
            self.trainee.load_state_dict(load_checkpoint(path).tensors)
        result.seconds = time.monotonic() - self.began
        result.skipped = self.skips.num_left_out
        everyones = set(gather_object(sorted(self.notes)))
        result.notes = dict(Counter(note for note, _, _ in everyones))
        result.peak_memory_bytes = peak_memory_bytes(self.accelerator.device)
        return result

    def _train(self, step: int, data: StepBatch) -> tuple[dict[str, Any], bool]:
        """One optimizer step: the line to log of it, empty where none is due, and whether a
        process was asked to stop."""
        factor = learning_rate_factor(
            step,
            total_steps=self.schedule.total_steps,
            warmup_steps=self.schedule.warmup_steps,
            schedule=self.section.schedule,
        )
        rates = set_learning_rate(self.trainee.optimizer.optimizer, factor)
        is_last = step == self.schedule.total_steps
        is_logged = step % self.section.log_every == 0 or is_last
        asked = self.stop.received is not None
        method_log = self._launch(step, data, stop_requested=asked, log_parts=is_logged)
        is_due = is_logged or bool(method_log) or self._evaluates(step) or self._saves(step)
        # Of several processes all must see the same: what one was asked is known when it is read.
        is_due = is_due or not self.defer_sync or (asked and self.accelerator.num_processes == 1)
        done = self._read(all_but=0 if is_due else 1)
        stops = done is not None and done.stop
        if stops:
            done = self._read(all_but=0) or done
        if not is_logged or done is None:
            return method_log, stops
        line = self.window.line(
            done,
            rates,
            epoch=data.epoch,
            objective=self.trainee.objective,
            accelerator=self.accelerator,
        )
        self.window = MetricsAccumulator()
        return line | method_log, stops

    def _launch(
        self, step: int, data: StepBatch, *, stop_requested: bool, log_parts: bool
    ) -> dict[str, object]:
        """Do a step, its figures not yet read; what the adapter's method has to log."""
        trainee = self.trainee
        pending = train_step(
            trainee.forward,
            step=step,
            data=data,
            objective=trainee.objective,
            method=trainee.method,
            parameters=trainee.parameters,
            part_of_name=trainee.part_of_name,
            optimizer=trainee.optimizer,
            accelerator=self.accelerator,
            max_grad_norm=self.section.max_grad_norm,
            stop_requested=stop_requested,
            log_parts=log_parts,
            defer_sync=self.defer_sync,
        )
        self.pending.append(pending)
        self.notes.update(data.notes)
        self.cursor = data.cursor
        self.window.launched(data, num_processes=self.accelerator.num_processes)
        self.result.samples += data.num_step_samples
        return pending.method_log

    def _read(self, *, all_but: int) -> StepResult | None:
        """Read the launched steps, all but the newest `all_but`; the last of them. A collective
        where samples were left out."""
        done = None
        while len(self.pending) > all_but:
            pending = self.pending.popleft()
            done = pending.read()
            if done.num_left_out:
                everyones = gather_object(pending.left_out)
                self.skips.add(everyones, write=self.accelerator.is_main_process)
            self.window.add(done)
            self._count(pending.step, done)
        return done

    def _count(self, step: int, done: StepResult) -> None:
        result = self.result
        result.steps = step
        result.samples -= done.num_left_out
        result.terms += done.num_terms
        result.loss = self.window.loss
        training_seconds = time.monotonic() - self.began - result.paused_seconds
        self.tracker.advance(step, result.loss, result.samples / training_seconds)

    def _evaluates(self, step: int) -> bool:
        is_last = step == self.schedule.total_steps
        return self.evaluate is not None and (step % self.schedule.eval_every == 0 or is_last)

    def _saves(self, step: int) -> bool:
        return step % self.schedule.save_every == 0 or step == self.schedule.total_steps

    def _evaluate_log_save(self, step: int, line: dict[str, Any], *, stops: bool) -> bool:
        """Evaluate, log and save where they are due; whether training goes on."""
        schedule, result = self.schedule, self.result
        is_last = step == schedule.total_steps
        if self.evaluate is not None and self._evaluates(step):
            values = self._evaluated(self.evaluate, step)
            line = line | values
            result.best = _best_after(result.best, schedule.best_metric, step, values)
        if line:
            self.tracker.log(step, line)
        is_best = result.best is not None and result.best.step == step
        over = is_over(result.best, schedule.patience)
        if self._saves(step) or stops or is_best or over:
            self._save(step)
        if stops and not is_last:
            result.stopped_by = self.stop.exit_code
            return False
        if over and not is_last:
            self.tracker.say(
                f"stopping after step {step}: no better {schedule.best_metric} in "
                f"{schedule.patience} evaluations"
            )
        return not over

    def _evaluated(self, evaluate: Evaluate, step: int) -> dict[str, float]:
        """The figures at `step`; modes and random state are as before."""
        before = random_state()
        self.trainee.forward.eval()
        try:
            return evaluate(step, self.tracker.evaluating)
        finally:
            self.trainee.forward.train()
            restore_random_state(before)

    def _save(self, step: int) -> None:
        assert not self.pending, "what is saved was read, and is finite"
        num_processes = self.accelerator.num_processes
        left_out = self.skips.as_list()
        state = CheckpointMeta(
            step,
            num_processes,
            self.fingerprint,
            left_out,
            self.result.best,
            num_bad=self.skips.num_bad,
            cursor=None if self.cursor is None else self.cursor.as_dict(),
        )
        save(self.trainee, state, self.accelerator, self.writer)

    def _pause_since(self, moment: float) -> None:
        """Evaluating and saving are no part of the training speed."""
        seconds = time.monotonic() - moment
        self.window.started += seconds
        self.result.paused_seconds += seconds


def _best_after(
    best: Best | None, metric: str | None, step: int, values: Mapping[str, float]
) -> Best | None:
    if metric is None:
        return None
    own = {n.removeprefix(EVAL_PREFIX): v for n, v in values.items() if n.startswith(EVAL_PREFIX)}
    return updated(best, metric=metric, step=step, values=own)
