"""`vlmtune train RECIPE`: the main job, on one device or under `accelerate launch`."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmtune.cli.common import (
    DebugOption,
    JsonOption,
    OverridesArgument,
    QuietOption,
    RecipeArgument,
    command,
    print_json,
    setup_logging,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vlmtune.data.encode import Encoder
    from vlmtune.data.types import Conversation
    from vlmtune.models.adapters.base import Adapter
    from vlmtune.models.load import VLM
    from vlmtune.recipe.load import LoadedRecipe
    from vlmtune.recipe.schema import Recipe
    from vlmtune.train.checkpoint import Checkpoint
    from vlmtune.train.feed import StepDataset
    from vlmtune.train.loop import Evaluate, Trainee, TrainResult
    from vlmtune.train.skips import SkipLedger

ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="auto|never|DIR",
        help="auto: go on from the newest complete checkpoint, or start. never: start over; an old "
        "run is renamed. DIR: go on from this checkpoint. Not given: the folder must be free.",
    ),
]


@command
def train_command(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    resume: ResumeOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a model from a recipe into the folder `output_dir`."""
    from vlmtune.recipe.load import load_recipe

    is_main = os.environ.get("RANK", "0") == "0"
    quiet = quiet or not is_main
    setup_logging(quiet)
    loaded = load_recipe(recipe, overrides or ())
    # Imported here: the start of torch and transformers takes seconds, a wrong recipe none.
    from vlmtune.train.run_folder import choose_start
    from vlmtune.train.runtime import build_accelerator, joined

    start = choose_start(Path(loaded.recipe.output_dir), resume)
    with joined(build_accelerator(loaded.recipe.train.precision)) as accelerator:
        accelerator.wait_for_everyone()  # all have looked at the folder before one writes to it
        session = Session(loaded, accelerator, resume, quiet)
        summary = session.run(start)
    if is_main and json:
        print_json(summary)
    elif not quiet:
        _print_summary(summary)
    if summary["stopped_by"] is not None:
        raise typer.Exit(summary["stopped_by"])


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
        from vlmtune.data.source import load_conversations
        from vlmtune.models.adapters.registry import build_adapter
        from vlmtune.train import build, checkpoint, run_folder

        recipe = self.recipe
        hashes = build.data_hashes_of(recipe)
        fingerprint = build.fingerprint_of(recipe, hashes)
        if start is not None:
            checkpoint.check_fingerprint(start.state.fingerprint, fingerprint, path=self.folder)
        policy = recipe.data.on_bad_sample
        conversations, skipped = load_conversations(
            build.as_list(recipe.data.train), on_bad_sample=policy
        )
        held_out, unusable = load_conversations(
            build.as_list(recipe.data.eval), on_bad_sample=policy
        )
        for bad in unusable:
            logging.getLogger("vlmtune").warning("not evaluated on: %s", bad.reason)
        total_steps = build.total_steps_of(recipe, len(conversations))
        if start is not None and start.state.step == total_steps:
            finished = run_folder.finished_result(self.folder)
            if finished is not None:
                return {"run": self.folder, "steps": total_steps, "result": finished} | NOT_RUN
        ledger = build.build_ledger(
            recipe, folder=self.folder, num_samples=len(conversations) + len(skipped)
        )
        ledger.restore([] if start is None else start.state.left_out)
        ledger.add(build.left_out(skipped), write=False)
        vlm = self.load_model()
        if not self.quiet:
            _print_model(vlm, len(conversations))
        # The adapter's random start is the same on every process; dropout afterwards is not.
        build.seed_everything(recipe.seed, 0)
        adapter = build_adapter(vlm, recipe, total_steps=total_steps)
        build.seed_everything(recipe.seed, self.accelerator.process_index)
        encoder = build.build_encoder(recipe, vlm)
        trainee = build.build_trainee(
            recipe,
            vlm=vlm,
            adapter=adapter,
            conversations=conversations,
            encoder=encoder,
            accelerator=self.accelerator,
        )
        dataset = build.build_dataset(
            recipe,
            conversations=conversations,
            encoder=encoder,
            vlm=vlm,
            accelerator=self.accelerator,
        )
        if not self.quiet:
            _print_plan(self, vlm, adapter, trainee, total_steps, start)
        evaluate = self.evaluation(vlm, adapter, trainee, encoder, held_out)
        # Only now: a recipe that fails on the way here leaves no folder and moves no old run.
        self.prepare_folder(hashes, vlm.commit, ledger, start)
        result = self.train(trainee, dataset, total_steps, fingerprint, ledger, evaluate, start)
        saved = None
        if result.stopped_by is None:
            saved = self.folder / ("model" if adapter.name == "full" else "adapter")
            if self.accelerator.is_main_process:
                run_folder.write_result(self.folder, saved.name, adapter.save)
            self.accelerator.wait_for_everyone()
        return _summary(self.folder, saved, result, trainee)

    def load_model(self) -> VLM:
        from vlmtune.models.load import load_vlm
        from vlmtune.train.runtime import DTYPES

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
        ledger: SkipLedger,
        start: Checkpoint | None,
    ) -> None:
        """Set aside what this run replaces, and write what it is; the main process does."""
        from vlmtune.recipe.load import dump_recipe
        from vlmtune.train import run_folder
        from vlmtune.train.runtime import describe_environment

        if self.accelerator.is_main_process:
            old = run_folder.set_aside(self.folder) if self.resume == "never" else None
            if old is not None and not self.quiet:
                print(f"the old run is now {old}", file=sys.stderr)
            environment = describe_environment(self.accelerator)
            run_folder.write_records(
                self.folder,
                recipe_text=self.loaded.text,
                resolved_text=dump_recipe(self.recipe),
                environment=environment | {"model_commit": commit, "data_sha256": hashes},
            )
            if start is not None:
                run_folder.set_aside_newer(self.folder, start.state.step)
            ledger.write()
        self.accelerator.wait_for_everyone()

    def train(
        self,
        trainee: Trainee,
        dataset: StepDataset,
        total_steps: int,
        fingerprint: dict[str, Any],
        ledger: SkipLedger,
        evaluate: Evaluate | None,
        start: Checkpoint | None,
    ) -> TrainResult:
        from vlmtune.train.feed import steps_from
        from vlmtune.train.loop import Schedule, train

        return train(
            trainee,
            section=self.recipe.train,
            schedule=Schedule.of(self.recipe.train, total_steps),
            make_steps=lambda first, last: steps_from(
                dataset, first=first, last=last, num_workers=self.recipe.data.num_workers
            ),
            accelerator=self.accelerator,
            folder=self.folder,
            fingerprint=fingerprint,
            skips=ledger,
            evaluate=evaluate,
            resume=start,
            quiet=self.quiet,
        )

    def evaluation(
        self,
        vlm: VLM,
        adapter: Adapter,
        trainee: Trainee,
        encoder: Encoder,
        held_out: list[Conversation],
    ) -> Evaluate | None:
        """Loss and generated answers on held-out data, as the loop's callback; None without."""
        if not held_out:
            return None
        from accelerate.utils import gather_object

        from vlmtune.evaluation.runner import evaluate as score
        from vlmtune.models.processor import pad_token_id
        from vlmtune.train.build import usable
        from vlmtune.train.eval_loss import evaluation_loss

        section, accelerator = self.recipe.eval, self.accelerator
        conversations = usable(
            held_out[: section.max_samples],
            encoder=encoder,
            skip=self.recipe.data.on_bad_sample == "skip",
        )
        trained = dataclasses.replace(vlm, model=adapter.model)

        def evaluate() -> dict[str, float]:
            values = evaluation_loss(
                accelerator.unwrap_model(trainee.forward),
                conversations,
                encoder=encoder,
                accelerator=accelerator,
                micro_batch_tokens=self.recipe.train.micro_batch_tokens,
                pad_token_id=pad_token_id(vlm.processor),
                media_layout=vlm.family.media_layout,
            )
            with accelerator.autocast():
                report = score(
                    trained,
                    conversations,
                    encoder=encoder,
                    section=section,
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                    gather=gather_object,
                )
            return values | {name: metric.value for name, metric in report.metrics.items()}

        return evaluate


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
}
"""The figures of a session that found its run finished."""


def _summary(
    folder: Path, saved: Path | None, result: TrainResult, trainee: Trainee
) -> dict[str, Any]:
    seconds = max(result.seconds - result.paused_seconds, 1e-9)
    return {
        "run": folder,
        "result": saved,
        "steps": result.steps,
        "samples": result.samples,
        "loss": result.loss,
        "samples_per_second": result.samples / seconds,
        "supervised_tokens_per_second": result.supervised_tokens / seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "trainable_parameters": sum(p.numel() for p in trainee.parameters.values()),
        "skipped": result.skipped,
        "notes": result.notes,
        "seconds": result.seconds,
        "stopped_by": result.stopped_by,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    if summary["stopped_by"] is not None:
        print(
            f"stopped after step {summary['steps']}; a checkpoint is in {summary['run']}; "
            "go on with --resume auto",
            file=sys.stderr,
        )
        return
    if summary["loss"] is None:
        print(f"already finished: {summary['result']}", file=sys.stderr)
        return
    loss = f", loss {summary['loss']:.4f}" if summary["samples"] else ""
    lines = [f"{summary['result']}: {summary['steps']} steps{loss}"]
    if summary["skipped"]:
        lines.append(
            f"{summary['skipped']} samples were not trained on: see "
            f"{summary['run'] / 'skipped.jsonl'}"
        )
    lines += [f"{count} samples: {note}" for note, count in sorted(summary["notes"].items())]
    print("\n".join(lines))


def _print_model(vlm: VLM, num_samples: int) -> None:
    """What was loaded, read off the model before an adapter adds layers, on stderr."""
    from vlmtune.cli.tables import print_table
    from vlmtune.models.quantize import quantization_report

    print(f"{vlm.source} ({vlm.family.name}), {num_samples} samples", file=sys.stderr)
    print_table("linear modules by bits", quantization_report(vlm.model, vlm.family))


def _print_plan(
    session: Session,
    vlm: VLM,
    adapter: Adapter,
    trainee: Trainee,
    total_steps: int,
    start: Checkpoint | None,
) -> None:
    """What is about to happen, read off the built model, on stderr."""
    from vlmtune.cli.tables import print_table
    from vlmtune.models.summary import trained_rows

    recipe = session.recipe
    print_table(f"trained by {adapter.name}", trained_rows(adapter.model, vlm.family))
    trained = sum(p.numel() for p in trainee.parameters.values())
    first = "" if start is None else f", from step {start.state.step + 1}"
    print(
        f"{trained:,} trained parameters, {total_steps} steps of {recipe.train.batch_size} "
        f"samples{first}, {session.accelerator.num_processes} process(es) on "
        f"{session.accelerator.device}, {recipe.train.precision}",
        file=sys.stderr,
    )
