"""A training run from a recipe to its result.

recipe -> start or checkpoint -> data -> model, adapter -> state, steps, evaluation
       -> loop -> result and summary in the run folder
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from vlmtune.data.types import Skipped
from vlmtune.errors import ErrorGroup, plural
from vlmtune.evaluation.guard import GuardVerdict
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.load import VLM, load_vlm
from vlmtune.models.precision import bfloat16_errors, capability_of
from vlmtune.models.quantize import BitsRow, quantization_report
from vlmtune.models.targets import TrainedRow, trained_rows
from vlmtune.recipe.load import LoadedRecipe, dump_recipe
from vlmtune.recipe.schema import Recipe
from vlmtune.sessions.console import print_table
from vlmtune.sessions.train_evaluation import build_evaluation, load_eval_sets, verdict_of_run
from vlmtune.train import build, run_folder
from vlmtune.train.checkpoint import (
    Best,
    Checkpoint,
    best_by,
    check_fingerprint,
    data_hashes_of,
    fingerprint_of,
)
from vlmtune.train.loop import Schedule, TrainLoop, TrainResult, is_finished
from vlmtune.train.probe import TrainingData
from vlmtune.train.run_folder import SkipLog
from vlmtune.train.runtime import DTYPES, build_accelerator, describe_environment, joined
from vlmtune.train.state import TrainState


@dataclass(frozen=True)
class TrainSummary:
    """What came of a run: what `--json` prints and `summary.json` keeps.

    `result` is the folder of the adapter or model, None where a signal stopped the run (then
    `stopped_by` is the exit code). Figures are those of this session: of one that found its run
    finished already, they are None or 0. Of the two rates of loss terms, one is that of the
    recipe's objective. `vision_cache` counts pictures, in this process.
    """

    run: Path
    steps: int
    result: Path | None = None
    samples: int = 0
    loss: float | None = None
    samples_per_second: float | None = None
    supervised_tokens_per_second: float | None = None
    pairs_per_second: float | None = None
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    skipped: int = 0
    notes: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    stopped_by: int | None = None
    best: Best | None = None
    guard: GuardVerdict | None = None
    vision_cache: Mapping[str, int] | None = None


def train(loaded: LoadedRecipe, *, resume: str | None = None, quiet: bool = False) -> TrainSummary:
    """Train as the recipe says, into its `output_dir`; runs on every process of a launch.

    `resume` is what `--resume` takes; None wants a folder without a run's work in it. Raises
    VlmtuneError for what the user can put right, before the model is loaded where it shows there.
    """
    start = run_folder.choose_start(Path(loaded.recipe.output_dir), resume)
    with joined(build_accelerator(loaded.recipe.train.precision)) as accelerator:
        accelerator.wait_for_everyone()  # all have looked at the folder before one writes to it
        quiet = quiet or not accelerator.is_main_process
        return _Session(loaded, start, accelerator, resume, quiet).run()


@dataclass(frozen=True)
class _Session:
    """One run of the command: the recipe, the checkpoint to go on from, and the processes."""

    loaded: LoadedRecipe
    start: Checkpoint | None
    accelerator: Accelerator
    resume: str | None
    quiet: bool

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    def run(self) -> TrainSummary:
        """Load, build, train, save. Contains collectives."""
        recipe, accelerator = self.recipe, self.accelerator
        if errors := bfloat16_errors(recipe, capability_of(accelerator.device)):
            raise ErrorGroup(errors)
        hashes = data_hashes_of(recipe)
        fingerprint = fingerprint_of(recipe, hashes)
        self.check_start(fingerprint)
        data, skipped = build.open_training_data(recipe)
        eval_sets = load_eval_sets(recipe)
        total_steps = build.total_steps_of(recipe, data)
        if (finished := self.summary_of_finished(total_steps)) is not None:
            return finished
        best_path = self.find_best()
        skip_log = self.build_skip_log(data, skipped)
        vlm = load_model(recipe, accelerator.device)
        linear_modules = quantization_report(vlm.model, vlm.family)
        if not self.quiet:
            print_model(vlm, build.num_samples_of(data), linear_modules)
        # The adapter's random start is the same on every process; dropout afterwards is not.
        build.seed_everything(recipe.seed, 0)
        adapter = build_adapter(vlm, recipe, total_steps=total_steps)
        build.seed_everything(recipe.seed, accelerator.process_index)
        encoder = build.build_encoder(recipe, vlm)
        common: dict[str, Any] = {"encoder": encoder, "accelerator": accelerator}
        state = build.build_state(recipe, vlm=vlm, adapter=adapter, data=data, **common)
        position = None if self.start is None else self.start.state
        make_steps = build.build_steps(recipe, vlm=vlm, data=data, start=position, **common)
        trained = trained_rows(adapter.model, vlm.family)
        if not self.quiet:
            self.print_plan(adapter.name, trained, state, total_steps)
        adapted = dataclasses.replace(vlm, model=adapter.model)
        evaluate = build_evaluation(
            recipe, vlm=adapted, state=state, eval_sets=eval_sets, folder=self.folder, **common
        )
        training = TrainLoop(
            state,
            section=recipe.train,
            schedule=Schedule.of(recipe.train, recipe.eval, total_steps),
            accelerator=accelerator,
            folder=self.folder,
            fingerprint=fingerprint,
            skips=skip_log,
            evaluate=evaluate,
            quiet=self.quiet,
        )
        prepare_folder = partial(
            self.prepare_folder,
            environment={"model_commit": vlm.commit, "data_sha256": hashes},
            tables=(trained, linear_modules),
            skip_log=skip_log,
            best_path=best_path,
        )
        result = training.run(make_steps, prepare_folder=prepare_folder, resume=self.start)
        return self.save_result(result, state)

    def check_start(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise VlmtuneError where the checkpoint is of another run than the recipe's."""
        if self.start is not None:
            check_fingerprint(self.start.state.fingerprint, fingerprint, path=self.folder)
            run_folder.check_same_run(self.folder, fingerprint)

    def summary_of_finished(self, total_steps: int) -> TrainSummary | None:
        """The summary of a run that has no step left to do; None where there is one."""
        saved = run_folder.finished_result(self.folder)
        if self.start is None or saved is None:
            return None
        position = self.start.state
        if not is_finished(position, self.recipe, total_steps):
            return None
        best = best_by(position.best, self.recipe.eval.best_metric)
        guard = self.guard_verdict(position.step, best)
        return TrainSummary(self.folder, position.step, saved, best=best, guard=guard)

    def find_best(self) -> Path | None:
        """The checkpoint of the best step so far, if the recipe chooses the result by a metric."""
        if self.start is None:
            return None
        position = self.start.state
        best = best_by(position.best, self.recipe.eval.best_metric)
        if best is None:
            return None
        return run_folder.find_best(self.folder, best, resume=self.resume, step=position.step)

    def build_skip_log(self, data: TrainingData, skipped: Sequence[Skipped]) -> SkipLog:
        """The log with what is left out already: by the run so far, and by the reader."""
        skip_log = build.build_skip_log(
            self.recipe, folder=self.folder, data=data, num_skipped=len(skipped)
        )
        if self.start is not None:
            position = self.start.state
            skip_log.restore(position.left_out, num_bad=position.num_bad)
        skip_log.add(build.left_out(skipped), write=False)
        return skip_log

    def print_plan(
        self, method: str, trained: Sequence[TrainedRow], state: TrainState, total_steps: int
    ) -> None:
        """What is about to happen, read off the built model, on stderr."""
        print_table(f"trained by {method}", trained)
        first = "" if self.start is None else f", from step {self.start.state.step + 1}"
        print(
            f"{plural(state.num_parameters, 'trained parameter')}, {plural(total_steps, 'step')} "
            f"of {plural(self.recipe.train.batch_size, 'sample')}{first}, "
            f"{plural(self.accelerator.num_processes, 'process', 'processes')} on "
            f"{self.accelerator.device}, {self.recipe.train.precision}",
            file=sys.stderr,
        )

    def prepare_folder(
        self,
        *,
        environment: Mapping[str, Any],
        tables: tuple[Sequence[TrainedRow], Sequence[BitsRow]],
        skip_log: SkipLog,
        best_path: Path | None,
    ) -> None:
        """Set aside or remove what this run replaces, and write what it is. A collective: a
        process that failed on the way here leaves no folder and moves no old run."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.replace_old_run()
            run_folder.write_records(
                self.folder,
                recipe_text=self.loaded.text,
                resolved_text=dump_recipe(self.recipe),
                environment=describe_environment(self.accelerator) | dict(environment),
            )
            step = 0 if self.start is None else self.start.state.step
            if self.start is not None:
                run_folder.set_aside_newer(self.folder, step)
                if self.resume != "auto":
                    other = Path(str(self.resume)).resolve().parent.parent
                    run_folder.bring_from(other, self.folder, step=step, best=best_path)
            run_folder.drop_evaluations_after(self.folder, step)
            skip_log.write()
            trained, linear_modules = tables
            run_folder.write_modules(self.folder, trained=trained, linear_modules=linear_modules)
        self.accelerator.wait_for_everyone()

    def replace_old_run(self) -> None:
        text = None
        if self.resume == "never":
            old = run_folder.set_aside(self.folder)
            text = None if old is None else f"the old run is now {old}"
        elif run_folder.drop_records(self.folder):
            text = f"{self.folder}: replacing a run that ended before its first checkpoint"
        if text is not None and not self.quiet:
            print(text, file=sys.stderr)

    def save_result(self, result: TrainResult, state: TrainState) -> TrainSummary:
        """Write the adapter or model of a run that came to its end, and the summary. A collective;
        the main process writes."""
        saved, guard = None, None
        if result.stopped_by is None:
            saved = self.folder / ("model" if state.adapter.name == "full" else "adapter")
            if self.accelerator.is_main_process:
                save = build.saver(self.recipe, state)
                run_folder.write_result(self.folder, saved.name, save)
            self.accelerator.wait_for_everyone()
            guard = self.guard_verdict(result.steps, result.best)
        seconds = max(result.seconds - result.paused_seconds, 1e-9)
        rates = {state.objective.unit: result.terms / seconds}
        cache = None if state.features is None else state.features.cache
        summary = TrainSummary(
            run=self.folder,
            steps=result.steps,
            result=saved,
            samples=result.samples,
            loss=result.loss if result.samples else None,
            samples_per_second=result.samples / seconds,
            supervised_tokens_per_second=rates.get("supervised_tokens"),
            pairs_per_second=rates.get("pairs"),
            peak_memory_bytes=result.peak_memory_bytes,
            trainable_parameters=state.num_parameters,
            skipped=result.skipped,
            notes=result.notes,
            seconds=result.seconds,
            stopped_by=result.stopped_by,
            best=result.best,
            guard=guard,
            vision_cache=None if cache is None else cache.figures(),
        )
        if self.accelerator.is_main_process:
            run_folder.write_summary(self.folder, dataclasses.asdict(summary))
        return summary

    def guard_verdict(self, steps: int, best: Best | None) -> GuardVerdict | None:
        """The guard's verdict on the result: the best step's, or the last of `steps`."""
        return verdict_of_run(self.recipe, self.folder, step=steps if best is None else best.step)


def load_model(recipe: Recipe, device: torch.device) -> VLM:
    """The recipe's model, in the precision that it trains in."""
    return load_vlm(
        recipe.model,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        quantization_bit=recipe.quantization_bit,
        quantization=recipe.quantization,
        dtype=DTYPES[recipe.train.precision],
        device=device,
        image=recipe.image,
        parts=recipe.parts,
    )


def print_model(vlm: VLM, num_samples: int | None, linear_modules: Sequence[BitsRow]) -> None:
    """What was loaded, read off the model before an adapter adds layers, on stderr. `num_samples`:
    None where they are streamed."""
    samples = "samples streamed" if num_samples is None else plural(num_samples, "sample")
    print(f"{vlm.source} ({vlm.family.name}), {samples}", file=sys.stderr)
    print_table("linear modules by bits", linear_modules)
