"""The training loop.

    restore, first step's data -> prepare the folder -> evaluate before -> for each optimizer step:
        fetch -> learning rate -> train_step -> read -> evaluate -> log -> save -> stop?

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
from vlmtune.errors import plural
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
    learning_rate: str
    log_every: int
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
            learning_rate=section.schedule,
            log_every=section.log_every,
            eval_every=resolve_count(section.eval_every, total_steps, whole=True),
            save_every=resolve_count(section.save_every, total_steps, whole=True),
            evaluates_before=evaluation.before or evaluation.guard is not None,
            best_metric=evaluation.best_metric,
            patience=evaluation.patience,
        )

    def learning_rate_factor(self, step: int) -> float:
        """The share of the peak learning rate at `step`."""
        return learning_rate_factor(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            schedule=self.learning_rate,
        )

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that is done `every` so many steps, and at the end, is done now."""
        return step % every == 0 or step == self.total_steps


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


def is_finished(meta: CheckpointMeta, recipe: Recipe, total_steps: int) -> bool:
    """Whether a run that stands here has no step left to do."""
    best = best_by(meta.best, recipe.eval.best_metric)
    return meta.step == total_steps or is_over(best, recipe.eval.patience)


@dataclass
class TrainLoop:
    """A session of training: what it works with and, set by `run`, how far it has come.

    `evaluate` is a collective and returns the metrics to log.
    """

    state: TrainState
    section: TrainSection
    schedule: Schedule
    accelerator: Accelerator
    folder: Path
    fingerprint: dict[str, Any]
    skips: SkipLog
    evaluate: Evaluate | None
    quiet: bool = False
    result: TrainResult = field(init=False)
    window: MetricsAccumulator = field(init=False)
    began: float = field(init=False)
    writer: CheckpointWriter = field(init=False)
    tracker: Tracker = field(init=False)
    stop: StopSignal = field(init=False, default_factory=StopSignal)
    launched: deque[AsyncStepMetrics] = field(init=False, default_factory=deque)
    notes: set[tuple[str, str, int]] = field(init=False, default_factory=set)
    cursor: StreamCursor | None = field(init=False, default=None)

    def run(
        self,
        make_steps: Callable[[int, int], Iterator[StepBatch]],
        *,
        prepare_folder: Callable[[], None],
        resume: Checkpoint | None = None,
    ) -> TrainResult:
        """Train from the step after `resume` (or 1) to the last; runs on every process.

        `make_steps(first, last)` yields this process's data. `prepare_folder` is called before
        anything is written, once the checkpoint is in place and the first step's data is there: a
        collective. Raises `VlmtuneError` for a checkpoint that does not fit, a non-finite loss, too
        many bad samples, a full disk, a worker process that is gone.
        """
        schedule = self.schedule
        first, best = 1, None
        if resume is not None:
            first, best = resume.state.step + 1, best_by(resume.state.best, schedule.best_metric)
            restore(self.state, resume, self.accelerator)
        # A run that early stopping ended has no step left to do.
        last = first - 1 if is_over(best, schedule.patience) else schedule.total_steps
        began = time.monotonic()
        with translate_worker_errors():
            steps = _with_first_made(make_steps(first, last))
        waited = time.monotonic() - began
        prepare_folder()
        self.began = time.monotonic() - waited
        self.window = MetricsAccumulator(started=self.began, wait_seconds=waited)
        self.result = TrainResult(steps=first - 1, best=best)
        with (
            self.stop,
            CheckpointWriter(self.folder / "checkpoints", keep=self.section.keep_checkpoints) as (
                self.writer
            ),
            Tracker(
                self.folder,
                total_steps=schedule.total_steps,
                first_step=first,
                quiet=self.quiet,
                active=self.accelerator.is_main_process,
            ) as self.tracker,
            translate_worker_errors(),
        ):
            if first == 1:
                self._evaluate_before()
            for step in range(first, last + 1):
                if not self._step(step, steps):
                    break
        return self._finish()

    def _step(self, step: int, steps: Iterator[StepBatch]) -> bool:
        """One optimizer step, from its samples to the update and what is due after it; whether
        training goes on."""
        schedule, state, accelerator = self.schedule, self.state, self.accelerator
        self.writer.check()
        waited = time.monotonic()
        batch = next(steps)
        self.window.wait_seconds += time.monotonic() - waited
        rates = set_learning_rate(state.optimizer.optimizer, schedule.learning_rate_factor(step))
        is_logged = schedule.is_due(step, schedule.log_every)
        defer_sync = should_defer_sync(accelerator.device)
        stop_requested = self.stop.received is not None
        metrics = train_step(
            state,
            batch,
            step=step,
            accelerator=accelerator,
            max_grad_norm=self.section.max_grad_norm,
            stop_requested=stop_requested,
            log_parts=is_logged,
            defer_sync=defer_sync,
        )
        self._count_launched(metrics, batch)
        is_read = is_logged or bool(metrics.adapter_log) or not defer_sync
        is_read = is_read or self._evaluates(step) or schedule.is_due(step, schedule.save_every)
        # Of several processes all must see the same: a request is known when the step is read.
        is_read = is_read or (stop_requested and accelerator.num_processes == 1)
        done = self._read(all_but=0 if is_read else 1)
        stops = done is not None and done.stop
        if stops:
            done = self._read(all_but=0) or done
        line: dict[str, Any] = {}
        if is_logged and done is not None:
            line = self.window.line(
                done,
                rates,
                epoch=batch.epoch,
                objective=state.objective,
                device=accelerator.device,
            )
            self.window = MetricsAccumulator()
        paused = time.monotonic()
        goes_on = self._evaluate_log_save(step, line | metrics.adapter_log, stops=stops)
        self._pause_since(paused)
        return goes_on

    def _count_launched(self, metrics: AsyncStepMetrics, batch: StepBatch) -> None:
        """Note a step whose figures are not yet read."""
        self.launched.append(metrics)
        self.notes.update(batch.notes)
        self.cursor = batch.cursor
        self.window.launched(batch, num_processes=self.accelerator.num_processes)
        self.result.samples += batch.num_step_samples

    def _read(self, *, all_but: int) -> StepResult | None:
        """Read the launched steps, all but the newest `all_but`; the last of them. A collective
        where samples were left out."""
        done, result = None, self.result
        while len(self.launched) > all_but:
            metrics = self.launched.popleft()
            done = metrics.read()
            if done.num_left_out:
                everyones = gather_object(metrics.left_out)
                self.skips.add(everyones, write=self.accelerator.is_main_process)
            self.window.add(done)
            result.steps = metrics.step
            result.samples -= done.num_left_out
            result.terms += done.num_terms
            result.loss = self.window.loss
            training_seconds = time.monotonic() - self.began - result.paused_seconds
            self.tracker.advance(metrics.step, result.loss, result.samples / training_seconds)
        return done

    def _evaluate_before(self) -> None:
        """The evaluation before the first step, where one is wanted."""
        if self.evaluate is None or not self.schedule.evaluates_before:
            return
        paused = time.monotonic()
        values = self._evaluated(self.evaluate, 0)
        self.tracker.log(0, values)
        if any(name.startswith(EVAL_PREFIX) for name in values):
            # An unknown metric is reported now, not after the first stretch of training.
            _best_after(None, self.schedule.best_metric, 0, values)
        self._pause_since(paused)

    def _evaluates(self, step: int) -> bool:
        return self.evaluate is not None and self.schedule.is_due(step, self.schedule.eval_every)

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
        if schedule.is_due(step, schedule.save_every) or stops or is_best or over:
            self._save(step)
        if stops and not is_last:
            result.stopped_by = self.stop.exit_code
            return False
        if over and not is_last:
            self.tracker.say(
                f"early stopping after step {step}: {schedule.best_metric} has not improved in "
                f"{plural(schedule.patience or 0, 'evaluation')}"
            )
        return not over

    def _evaluated(self, evaluate: Evaluate, step: int) -> dict[str, float]:
        """The figures at `step`; modes and random state are as before."""
        before = random_state()
        self.state.forward.eval()
        try:
            return evaluate(step, self.tracker.evaluating)
        finally:
            self.state.forward.train()
            restore_random_state(before)

    def _save(self, step: int) -> None:
        assert not self.launched, "what is saved was read, and is finite"
        meta = CheckpointMeta(
            step,
            self.accelerator.num_processes,
            self.fingerprint,
            self.skips.as_list(),
            self.result.best,
            num_bad=self.skips.num_bad,
            cursor=None if self.cursor is None else self.cursor.as_dict(),
        )
        save(self.state, meta, self.accelerator, self.writer)

    def _finish(self) -> TrainResult:
        """The figures of the session; the trained tensors are the best step's where one is
        chosen. A collective."""
        result = self.result
        self.accelerator.wait_for_everyone()  # the main process has written its last checkpoint
        if result.stopped_by is not None:
            result.best = None
        if result.best is not None and result.best.step != result.steps:
            path = checkpoint_path(self.folder / "checkpoints", result.best.step)
            self.state.load_state_dict(load_checkpoint(path).tensors)
        result.seconds = time.monotonic() - self.began
        result.skipped = self.skips.num_left_out
        everyones = set(gather_object(sorted(self.notes)))
        result.notes = dict(Counter(note for note, _, _ in everyones))
        result.peak_memory_bytes = peak_memory_bytes(self.accelerator.device)
        return result

    def _pause_since(self, moment: float) -> None:
        """Evaluating and saving are no part of the training speed."""
        seconds = time.monotonic() - moment
        self.window.started += seconds
        self.result.paused_seconds += seconds


def _with_first_made(steps: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """The same steps, the first one made already: what is wrong with it is raised here."""
    return itertools.chain(list(itertools.islice(steps, 1)), steps)


def _best_after(
    best: Best | None, metric: str | None, step: int, values: Mapping[str, float]
) -> Best | None:
    if metric is None:
        return None
    own = {n.removeprefix(EVAL_PREFIX): v for n, v in values.items() if n.startswith(EVAL_PREFIX)}
    return updated(best, metric=metric, step=step, values=own)
