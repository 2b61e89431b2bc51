"""Base + adapter into one checkpoint that stock transformers loads, verified before it appears.

    open, the weights left on the disk -> logits -> every tensor folded, rounded, written to shards
    -> the folder loaded again by stock transformers -> logits and tensors agree? -> rename

Never a merge into a quantised base: rounding W + change back to 4 bit loses most of the change.
Memory: the adapter, one module's weights in float32 at a time, and one shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from vlmtune.errors import VlmtuneError, plural
from vlmtune.models.embedding import RECORD_FILE
from vlmtune.models.forward import base_of
from vlmtune.models.merge_verify import (
    MergeFailed,
    MergeReport,
    Probe,
    Reference,
    TensorError,
    build_probes,
    error_of,
    float32_tolerance,
    keys_error,
    largest_difference,
    peak_memory_bytes,
    probe_logits,
    report_on,
    require,
    tensor_errors,
)
from vlmtune.models.merge_write import Folding, OutputPlan, open_lazily, plan_output, write_merged
from vlmtune.models.open import result_of_run
from vlmtune.models.streamed import Reader, load_lazily, streaming

logger = logging.getLogger("vlmtune")

SHARD_SIZE = "2GB"
SPACE_MARGIN = 1.02
"""Bytes on the disk for a byte of weights."""

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


def merge(
    target: str | Path,
    output: Path,
    *,
    dtype: DtypeName = "auto",
    shard_size: str = SHARD_SIZE,
    data: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> MergeReport:
    """Fold the adapter of a run or adapter folder into its base and write it to `output`.

    `dtype` auto: every tensor in the base's own. `data`: samples to compare logits on (else the
    run's own). `output` is complete and verified, or absent. A run without an adapter is written in
    `dtype`.

    Raises VlmtuneError for an occupied output, too little disk space or a target that cannot be
    opened, MergeFailed where the result is not base + adapter.
    """
    there = check_output(output)
    writing = there / f".writing-{output.name}"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        scratch = writing / "converted"
        folding = open_lazily(target, scratch, trust_remote_code=trust_remote_code)
        plan = plan_output(folding, None if dtype == "auto" else getattr(torch, dtype))
        # What transformers converts is written once more, when the result is loaded again.
        converted = sum(file.stat().st_size for file in scratch.glob("*"))
        check_space(plan.num_bytes + converted, output)
        probes = build_probes(folding.vlm, folding.files.recipe, data)
        merged = writing / "merged"
        reference = fold_and_write(folding, plan, probes, merged, shard_size=shard_size)
        report = verify_written(merged, folding, plan, reference)
        _copy_record(Path(target), folding.files.kind, merged)
        if output.exists():
            output.rmdir()
        output.parent.mkdir(parents=True, exist_ok=True)
        merged.rename(output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VlmtuneError(f"cannot be written: {reason}", file=output) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return dataclasses.replace(report, output=str(output))


def fold_and_write(
    folding: Folding, plan: OutputPlan, probes: list[Probe], folder: Path, *, shard_size: str
) -> Reference:
    """Write base + adapter to the new `folder`; the logits to expect of it.

    Raises MergeFailed where the folded weights do not give the logits of base + adapter.
    """
    model: Any = folding.vlm.model

    def logits(read: Reader) -> list[Tensor]:
        return streamed_logits(model, probes, folding.base_model.weights.keys(), read)

    adapted = logits(folding.base)
    reference = Reference(plan.dtype, probes, adapted, None, 0.0, float32_tolerance(adapted))
    is_adapter = isinstance(model, PeftModel)
    with model.disable_adapter() if is_adapter else contextlib.nullcontext():
        if is_adapter:
            reference = dataclasses.replace(reference, base=logits(folding.base))
        folded = logits(folding.folded)
        require(
            folded,
            reference,
            what="the folded model, before rounding,",
            blame=lambda: _farthest(_fold_errors(folding)),
        )
        rounded = folded
        if any(dtype != torch.float32 for dtype in plan.dtype_of.values()):
            rounded = logits(lambda name: folding.folded(name).to(plan.dtype_of[name]).float())
    rounding = largest_difference(rounded, folded, probes)[0]
    write_merged(folding, plan, folder, shard_size=shard_size)
    return dataclasses.replace(
        reference, rounding=rounding, tolerance=2 * reference.tolerance + rounding
    )


def verify_written(
    folder: Path, folding: Folding, plan: OutputPlan, reference: Reference
) -> MergeReport:
    """Hold a checkpoint on the disk, as stock transformers loads it, against base + adapter: its
    logits, and every tensor.

    Raises MergeFailed where the logits are farther from base + adapter than the tolerance, or not
    nearer to it than to the base alone, and where a tensor is missing, added or another than the
    plan's.
    """
    fault = keys_error(folder, plan)
    if fault is not None:
        nothing = [torch.full_like(logits, float("nan")) for logits in reference.adapted]
        report = report_on(nothing, reference)
        raise MergeFailed(f"the merged checkpoint is not whole: {fault}", report)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        merged = load_lazily(
            str(folder),
            Path(scratch),
            trust_remote_code=folding.files.trust_remote_code,
            parts=folding.files.parts,
        )
        logits = streamed_logits(
            merged.vlm.model, reference.probes, merged.weights.keys(), merged.read
        )
        report = require(
            logits,
            reference,
            what="the merged checkpoint",
            blame=lambda: _farthest(tensor_errors(merged, folding, plan)),
        )
        wrong = [error for error in tensor_errors(merged, folding, plan) if error.is_wrong]
    if wrong:
        raise MergeFailed(
            f"{plural(len(wrong), 'tensor')} of the merged checkpoint other than base + adapter"
            + _farthest(wrong),
            dataclasses.replace(report, verified=False),
        )
    return dataclasses.replace(report, peak_memory_bytes=peak_memory_bytes())


def streamed_logits(
    model: nn.Module, probes: list[Probe], names: Collection[str], read: Reader
) -> list[Tensor]:
    """The logits of every probe, the weights `names` being read module by module.

    NaN says that a module reached for another one's weight, or is in the weights: then all are read
    at once.
    """
    logits: list[Tensor] = []
    for at_once in (False, True):
        with streaming(base_of(model), names, read, at_once=at_once):
            logits = probe_logits(model, probes)
        if all(bool(torch.isfinite(values).all()) for values in logits):
            break
        if not at_once:
            logger.info("logits are not finite with weights read one by one: reading all at once")
    return logits


def check_output(output: Path) -> Path:
    """The nearest folder over `output` that exists.

    Raises VlmtuneError where something is at `output` already (an empty folder is fine), or it
    cannot be made.
    """
    if output.is_file():
        raise VlmtuneError("the output is a file", file=output, expected="a new folder")
    if output.is_dir() and any(output.iterdir()):
        raise VlmtuneError(
            "the output folder is not empty", file=output, do="name another, or remove it"
        )
    there = next(p for p in output.absolute().parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise VlmtuneError(
            "the output folder cannot be made",
            file=output,
            got=f"no permission to write in {there}" if there.is_dir() else f"a file at {there}",
            do="name another",
        )
    return there


def check_space(num_bytes: int, output: Path) -> None:
    """Raise VlmtuneError where the disk has no room for a checkpoint of `num_bytes`."""
    free = shutil.disk_usage(check_output(output)).free
    if free < num_bytes * SPACE_MARGIN:
        raise VlmtuneError(
            "not enough disk space for the merged model",
            file=output,
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{num_bytes * SPACE_MARGIN / 1e9:.1f} GB",
        )


def _fold_errors(folding: Folding) -> Iterator[TensorError]:
    for name in sorted(folding.changed):
        expected = folding.expected(name)
        if expected is not None:
            yield error_of(name, folding.folded(name), expected, is_exact=False)


def _farthest(errors: Iterable[TensorError]) -> str:
    """The weight that is farthest from what it should be, relative to its size."""
    worst = max(errors, key=lambda error: error.relative, default=None)
    if worst is None or worst.relative == 0:
        return ""
    return f"; farthest from W + its change: {worst.name}, by {worst.relative:.2%}"


def _copy_record(target: Path, kind: str, folder: Path) -> None:
    """The prompt of a contrastively trained adapter goes with the merged weights."""
    record = (result_of_run(target) if kind == "run" else target) / RECORD_FILE
    if record.is_file():
        shutil.copy(record, folder / RECORD_FILE)
