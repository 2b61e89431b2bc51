"""What `vlmtune train` says: what was loaded, what is about to happen, and what came of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.errors import plural

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vlmtune.models.load import VLM
    from vlmtune.models.summary import TrainedRow
    from vlmtune.recipe.schema import Recipe
    from vlmtune.train.checkpoint import Checkpoint
    from vlmtune.train.loop import TrainResult
    from vlmtune.train.trainee import Trainee

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
    folder: Path, saved: Path | None, result: TrainResult, trainee: Trainee
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


def _cache_figures(trainee: Trainee) -> dict[str, int] | None:
    """How often the features of a picture were kept already, in this process; None where none
    are kept."""
    if trainee.features is None or trainee.features.cache is None:
        return None
    return trainee.features.cache.figures()


def print_summary(summary: dict[str, Any]) -> None:
    if summary["stopped_by"] is not None:
        print(
            f"stopped after step {summary['steps']}; a checkpoint is in {summary['run']}; "
            "go on with --resume auto",
            file=sys.stderr,
        )
        return
    lines = []
    if summary["trainable_parameters"] is None:
        print(f"already finished: {summary['result']}", file=sys.stderr)
    else:
        loss = "" if summary["loss"] is None else f", loss {summary['loss']:.4f}"
        lines = [f"{summary['result']}: {plural(summary['steps'], 'step')}{loss}"]
    if summary["best"] is not None:
        best = summary["best"]
        lines.append(f"the result is step {best['step']}'s: {best['metric']} {best['value']:.4f}")
    if summary["skipped"]:
        lines.append(
            f"{plural(summary['skipped'], 'sample was', 'samples were')} not trained on: see "
            f"{summary['run'] / 'skipped.jsonl'}"
        )
    if summary["vision_cache"] is not None:
        lines.append(_cache_line(summary["vision_cache"]))
    lines += [
        f"{plural(count, 'sample')}: {note}" for note, count in sorted(summary["notes"].items())
    ]
    if summary["guard"] is not None:
        guard = summary["guard"]
        verdict = "forgotten: the guard's" if guard["has_fallen"] else "the guard's"
        lines.append(
            f"{verdict} {guard['metric']} went from {guard['before']:.4f} to {guard['after']:.4f}, "
            f"allowed is a drop of {guard['max_drop']:g}"
        )
    for line in lines:
        print(line)


def _cache_line(figures: dict[str, int]) -> str:
    sizes = [
        f"{figures[name] / 1e6:,.1f} MB {where}"
        for name, where in (("memory_bytes", "in memory"), ("disk_bytes", "on disk"))
        if name in figures
    ]
    left = f", {figures['not_kept']:,} not kept for want of room" if figures["not_kept"] else ""
    return (
        f"vision cache: {plural(figures['misses'], 'picture')} went through the tower, "
        f"{plural(figures['hits'], 'time')} one was kept ({', '.join(sizes)}{left})"
    )


def print_model(vlm: VLM, num_samples: int | None, linear_modules: Sequence[Any]) -> None:
    """What was loaded, read off the model before an adapter adds layers, on stderr. `num_samples`:
    None where they are streamed."""
    from vlmtune.cli.tables import print_table

    samples = "samples streamed" if num_samples is None else plural(num_samples, "sample")
    print(f"{vlm.source} ({vlm.family.name}), {samples}", file=sys.stderr)
    print_table("linear modules by bits", linear_modules)


def print_plan(
    recipe: Recipe,
    method: str,
    trained: Sequence[TrainedRow],
    trainee: Trainee,
    total_steps: int,
    start: Checkpoint | None,
    accelerator: Accelerator,
) -> None:
    """What is about to happen, read off the built model, on stderr."""
    from vlmtune.cli.tables import print_table

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
