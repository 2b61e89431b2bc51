"""A training run from a recipe to its result."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vlmtune.errors import ErrorGroup, plural
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.load import VLM, load_vlm
from vlmtune.models.precision import bfloat16_errors, capability_of
from vlmtune.models.quantize import quantization_report
from vlmtune.models.targets import TrainedRow, trained_rows
from vlmtune.recipe.load import LoadedRecipe, dump_recipe
from vlmtune.recipe.schema import Recipe
from vlmtune.sessions.console import print_table
from vlmtune.sessions.train_evaluation import build_evaluation, load_eval_sets, verdict_of_run
from vlmtune.train import build, checkpoint, run_folder
from vlmtune.train.checkpoint import Best, Checkpoint, best_by, data_hashes_of, fingerprint_of
from vlmtune.train.loop import Schedule, TrainResult, is_finished, train
from vlmtune.train.run_folder import SkipLog
from vlmtune.train.runtime import DTYPES, describe_environment
from vlmtune.train.state import TrainState

NOT_RUN: dict[str, Any] = {
    "samples": 0,
    "loss": None,
    "samples_per_second": None,
    "supervised_tokens_per_second": None,
    "peak_memory_bytes": None,
    "trainable_parameters": None,
    "skipped": 0,
    "notes": {},
    "seconds": 0.0,
    "stopped_by": None,
    "best": None,
    "guard": None,
    "vision_cache": None,
}
"""The figures of a session that found its run finished."""


def summary_of(
    folder: Path, saved: Path | None, result: TrainResult, trainee: TrainState
) -> dict[str, Any]:
    """What `--json` prints and `summary.json` keeps."""
    seconds = max(result.seconds - result.paused_seconds, 1e-9)
    return {
        "run": folder,
        "result": saved,
        "steps": result.steps,
        "samples": result.samples,
        "loss": result.loss if result.samples else None,
        "samples_per_second": result.samples / seconds,
        f"{trainee.objective.unit}_per_second": result.terms / seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "trainable_parameters": sum(p.numel() for p in trainee.parameters.values()),
        "skipped": result.skipped,
        "notes": result.notes,
        "seconds": result.seconds,
        "stopped_by": result.stopped_by,
        "best": None if result.best is None else dataclasses.asdict(result.best),
        "guard": None,
        "vision_cache": _cache_figures(trainee),
    }


def _cache_figures(trainee: TrainState) -> dict[str, int] | None:
    """How often the features of a picture were kept already, in this process; None where none
    are kept."""
    if trainee.features is None or trainee.features.cache is None:
        return None
    return trainee.features.cache.figures()


def print_model(vlm: VLM, num_samples: int | None, linear_modules: Sequence[Any]) -> None:
    """What was loaded, read off the model before an adapter adds layers, on stderr. `num_samples`:
    None where they are streamed."""

    samples = "samples streamed" if num_samples is None else plural(num_samples, "sample")
    print(f"{vlm.source} ({vlm.family.name}), {samples}", file=sys.stderr)
    print_table("linear modules by bits", linear_modules)


def print_plan(
    recipe: Recipe,
    method: str,
    trained: Sequence[TrainedRow],
    trainee: TrainState,
    total_steps: int,
    start: Checkpoint | None,
    accelerator: Accelerator,
) -> None:
    """What is about to happen, read off the built model, on stderr."""

    print_table(f"trained by {method}", trained)
    num_trained = sum(p.numel() for p in trainee.parameters.values())
    first = "" if start is None else f", from step {start.state.step + 1}"
    print(
        f"{plural(num_trained, 'trained parameter')}, {plural(total_steps, 'step')} of "
        f"{plural(recipe.train.batch_size, 'sample')}{first}, "
        f"{plural(accelerator.num_processes, 'process', 'processes')} on {accelerator.device}, "
        f"{recipe.train.precision}",
        file=sys.stderr,
    )


@dataclasses.dataclass(frozen=True)
class Session:
    """One run of the command: the recipe, the processes, and how it was asked to start."""

    loaded: LoadedRecipe
    accelerator: Accelerator
    resume: str | None
    quiet: bool

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    def run(self, start: Checkpoint | None) -> dict[str, Any]:
        """Load, build, train, save; what `--json` prints. Contains collectives."""

        recipe = self.recipe
        if errors := bfloat16_errors(recipe, capability_of(self.accelerator.device)):
            raise ErrorGroup(errors)
        hashes = data_hashes_of(recipe)
        fingerprint = fingerprint_of(recipe, hashes)
        if start is not None:
            checkpoint.check_fingerprint(start.state.fingerprint, fingerprint, path=self.folder)
            run_folder.check_same_run(self.folder, fingerprint)
        data, skipped = build.open_training_data(recipe)
        eval_sets = load_eval_sets(recipe)
        total_steps = build.total_steps_of(recipe, data)
        best_at = None
        if start is not None:
            best = best_by(start.state.best, recipe.eval.best_metric)
            step = start.state.step
            finished = run_folder.finished_result(self.folder)
            if finished is not None and is_finished(start.state, recipe, total_steps):
                return self.of_finished(finished, step, best)
            if best is not None:
                best_at = run_folder.find_best(self.folder, best, resume=self.resume, step=step)
        skip_log = build.build_skip_log(
            recipe, folder=self.folder, data=data, num_skipped=len(skipped)
        )
        if start is not None:
            skip_log.restore(start.state.left_out, num_bad=start.state.num_bad)
        skip_log.add(build.left_out(skipped), write=False)
        vlm = self.load_model()
        linear_modules = quantization_report(vlm.model, vlm.family)
        if not self.quiet:
            print_model(vlm, build.num_samples_of(data), linear_modules)
        # The adapter's random start is the same on every process; dropout afterwards is not.
        build.seed_everything(recipe.seed, 0)
        adapter = build_adapter(vlm, recipe, total_steps=total_steps)
        build.seed_everything(recipe.seed, self.accelerator.process_index)
        encoder = build.build_encoder(recipe, vlm)
        trainee = build.build_trainee(
            recipe,
            vlm=vlm,
            adapter=adapter,
            data=data,
            encoder=encoder,
            accelerator=self.accelerator,
        )
        make_steps = build.build_steps(
            recipe,
            data=data,
            encoder=encoder,
            vlm=vlm,
            accelerator=self.accelerator,
            start=None if start is None else start.state,
        )
        trained = trained_rows(adapter.model, vlm.family)
        if not self.quiet:
            print_plan(recipe, adapter.name, trained, trainee, total_steps, start, self.accelerator)
        evaluate = build_evaluation(
            recipe,
            vlm=dataclasses.replace(vlm, model=adapter.model),
            trainee=trainee,
            encoder=encoder,
            accelerator=self.accelerator,
            eval_sets=eval_sets,
            folder=self.folder,
        )

        def prepare_folder() -> None:
            # A process that failed on the way here leaves no folder and moves no old run.
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self.prepare_folder(hashes, vlm.commit, skip_log, start, best_at)
                run_folder.write_modules(
                    self.folder, trained=trained, linear_modules=linear_modules
                )
            self.accelerator.wait_for_everyone()

        result = train(
            trainee,
            section=recipe.train,
            schedule=Schedule.of(recipe.train, recipe.eval, total_steps),
            make_steps=make_steps,
            prepare_folder=prepare_folder,
            accelerator=self.accelerator,
            folder=self.folder,
            fingerprint=fingerprint,
            skips=skip_log,
            evaluate=evaluate,
            resume=start,
            quiet=self.quiet,
        )
        saved = None
        if result.stopped_by is None:
            saved = self.folder / ("model" if adapter.name == "full" else "adapter")
            if self.accelerator.is_main_process:
                run_folder.write_result(self.folder, saved.name, build.saver(recipe, trainee))
            self.accelerator.wait_for_everyone()
        summary = summary_of(self.folder, saved, result, trainee)
        if saved is not None:
            summary["guard"] = self.guard_at(result.steps, result.best)
        if self.accelerator.is_main_process:
            run_folder.write_summary(self.folder, summary)
        return summary

    def of_finished(self, result: Path, steps: int, best: Best | None) -> dict[str, Any]:
        """What `--json` prints of a run that has no step left to do."""
        known = {"run": self.folder, "steps": steps, "result": result}
        chosen = None if best is None else dataclasses.asdict(best)
        return NOT_RUN | known | {"best": chosen, "guard": self.guard_at(steps, best)}

    def guard_at(self, steps: int, best: Best | None) -> dict[str, object] | None:
        """The guard's verdict on the result: the best step's, or the last of `steps`."""
        step = steps if best is None else best.step
        verdict = verdict_of_run(self.recipe, self.folder, step=step)
        return None if verdict is None else verdict.as_dict()

    def load_model(self) -> VLM:

        recipe = self.recipe
        return load_vlm(
            recipe.model,
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
            quantization_bit=recipe.quantization_bit,
            quantization=recipe.quantization,
            dtype=DTYPES[recipe.train.precision],
            device=self.accelerator.device,
            image=recipe.image,
            parts=recipe.parts,
        )

    def prepare_folder(
        self,
        hashes: dict[str, str],
        commit: str | None,
        skip_log: SkipLog,
        start: Checkpoint | None,
        best_at: Path | None,
    ) -> None:
        """Set aside or remove what this run replaces, and write what it is."""

        if self.resume == "never":
            old = run_folder.set_aside(self.folder)
            if old is not None:
                self.say(f"the old run is now {old}")
        elif run_folder.drop_records(self.folder):
            self.say(f"{self.folder}: a run ended here before its first checkpoint; it is replaced")
        environment = describe_environment(self.accelerator)
        run_folder.write_records(
            self.folder,
            recipe_text=self.loaded.text,
            resolved_text=dump_recipe(self.recipe),
            environment=environment | {"model_commit": commit, "data_sha256": hashes},
        )
        step = 0 if start is None else start.state.step
        if start is not None:
            run_folder.set_aside_newer(self.folder, step)
            if self.resume != "auto":
                other = Path(str(self.resume)).resolve().parent.parent
                run_folder.bring_from(other, self.folder, step=step, best=best_at)
        run_folder.drop_evaluations_after(self.folder, step)
        skip_log.write()

    def say(self, text: str) -> None:
        """A line for the person watching."""
        if not self.quiet:
            print(text, file=sys.stderr)
