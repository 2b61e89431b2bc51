"""Base + adapter into one checkpoint that stock transformers loads, verified before it appears.

    open, the weights left on the disk -> logits -> every tensor folded, rounded, written beside
    -> what was written, read by stock transformers' names -> logits and tensors agree? -> rename

Never a merge into a quantised base: rounding W + change back to 4 bit loses most of the change.
Memory: the adapter, and one module's weights in float32 at a time (`streamed.py`). Only a model of
which transformers makes weights out of others when it loads it is held whole (`merge_whole.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
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
from vlmtune.models.load import load_processor, read_config
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
    loads_as_written,
    no_logits,
    peak_memory_bytes,
    probe_logits,
    require,
    tensor_errors,
)
from vlmtune.models.merge_whole import merge_whole
from vlmtune.models.merge_write import (
    Folding,
    LazyCheckpoint,
    OutputPlan,
    open_lazily,
    output_tensor,
    plan_output,
    write_merged,
)
from vlmtune.models.open import result_of_run
from vlmtune.models.streamed import (
    Reader,
    map_weights,
    size_in_bytes,
    stored_tensors,
    streaming,
    weight_files,
)

logger = logging.getLogger("vlmtune")

SHARD_SIZE = "2GB"
SPACE_MARGIN = 1.02
"""Bytes on the disk for a byte of weights."""

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


@dataclasses.dataclass(frozen=True)
class Written:
    """A checkpoint that was written from `folding` by `plan`, and what to hold it against."""

    folding: Folding
    plan: OutputPlan
    reference: Reference


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
    check_output(output)
    on_disk = open_lazily(target, trust_remote_code=trust_remote_code)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    check_space(_num_bytes(on_disk, wanted), output)
    writing = output.parent / f".writing-{output.name}"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        if on_disk.placed.converted:
            logger.info(
                "transformers converts weights of this model: it is merged whole, in memory"
            )
            report = merge_whole(
                target,
                writing,
                dtype=wanted,
                shard_size=shard_size,
                data=data,
                trust_remote_code=on_disk.trust_remote_code,
            )
        else:
            probes = build_probes(on_disk.opened.vlm, on_disk.opened.recipe, data)
            shard_bytes = size_in_bytes(shard_size)
            written = fold_and_write(
                on_disk, writing, probes, dtype=wanted, shard_bytes=shard_bytes
            )
            report = verify_written(writing, written, trust_remote_code=on_disk.trust_remote_code)
        _copy_record(Path(target), on_disk.opened.kind, writing)
        if output.exists():
            output.rmdir()
        writing.rename(output)
    except OSError as error:
        raise VlmtuneError(f"cannot be written: {error.strerror or error}", file=output) from error
    except SafetensorError as error:
        raise VlmtuneError(f"cannot be written: {error}", file=output) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return dataclasses.replace(report, output=str(output))


def fold_and_write(
    on_disk: LazyCheckpoint,
    folder: Path,
    probes: list[Probe],
    *,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> Written:
    """Write base + adapter to the new `folder`, and compute the logits to expect of it.

    Raises MergeFailed where the folded weights do not give the logits of base + adapter.
    """
    folding = Folding(on_disk)
    plan = plan_output(folding, dtype)
    model: Any = on_disk.opened.vlm.model
    names = on_disk.placed.key_of.keys()
    adapted = streamed_logits(model, probes, names, folding.base)
    reference = Reference(plan.dtype, probes, adapted, None, 0.0, float32_tolerance(adapted))
    with _without_adapter(model):
        if isinstance(model, PeftModel):
            base = streamed_logits(model, probes, names, folding.base)
            reference = dataclasses.replace(reference, base=base)
        folded = streamed_logits(model, probes, names, folding.folded)
        require(
            folded,
            reference,
            what="the folded model, before rounding,",
            blame=lambda: _shown(_fold_errors(folding)),
        )
        rounded = folded
        if any(tensor.dtype != torch.float32 for tensor in plan.tensors.values()):
            rounded = streamed_logits(model, probes, names, _written_reader(folding, plan))
    rounding = largest_difference(rounded, folded, probes).value
    reference = dataclasses.replace(
        reference, rounding=rounding, tolerance=2 * reference.tolerance + rounding
    )
    write_merged(folding, plan, on_disk, folder, dtype=dtype, shard_bytes=shard_bytes)
    return Written(folding, plan, reference)


def verify_written(
    folder: Path, written: Written, *, trust_remote_code: bool = False
) -> MergeReport:
    """Hold a checkpoint on the disk against base + adapter: its logits, and every tensor.

    Its names are found by stock transformers' own loading. Raises MergeFailed where the logits are
    farther from base + adapter than the tolerance, or not nearer to it than to the base alone, and
    where a tensor is missing, added or another than the plan's.
    """
    reference, plan, folding = written.reference, written.plan, written.folding
    fault = keys_error(folder, plan)
    if fault is not None:
        raise MergeFailed(f"the merged checkpoint is not whole: {fault}", no_logits(reference))
    config = read_config(str(folder), trust_remote_code=trust_remote_code)
    stored = stored_tensors(weight_files(str(folder)))
    placed = map_weights(config, stored, source=str(folder), trust_remote_code=trust_remote_code)
    load_processor(str(folder), trust_remote_code=trust_remote_code)
    logits = streamed_logits(placed.model, reference.probes, placed.key_of.keys(), placed.read)
    report = require(
        logits,
        reference,
        what="the merged checkpoint",
        blame=lambda: _shown(tensor_errors(folder, folding, plan)),
    )
    wrong = [error for error in tensor_errors(folder, folding, plan) if error.is_wrong]
    if wrong:
        raise MergeFailed(
            f"{plural(len(wrong), 'tensor')} of the merged checkpoint other than base + adapter"
            + _shown(wrong),
            dataclasses.replace(report, verified=False),
        )
    changed = loads_as_written(folder, placed, plan.dtype, trust_remote_code)
    if changed is not None:
        raise MergeFailed(
            f"the merged checkpoint loads with another weight than is in its files: {changed}",
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


def check_output(output: Path) -> None:
    """Raise VlmtuneError where something is at `output` already: an empty folder is fine."""
    if output.is_file():
        raise VlmtuneError("the output is a file", file=output, expected="a new folder")
    if output.is_dir() and any(output.iterdir()):
        raise VlmtuneError(
            "the output folder is not empty", file=output, do="name another, or remove it"
        )


def check_space(num_bytes: int, output: Path) -> None:
    """Raise VlmtuneError where the disk has no room for a checkpoint of `num_bytes`."""
    there = next(p for p in output.absolute().parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise VlmtuneError(
            "the output folder cannot be made",
            file=output,
            got=f"no permission to write in {there}" if there.is_dir() else f"a file at {there}",
            do="name another",
        )
    free = shutil.disk_usage(there).free
    if free < num_bytes * SPACE_MARGIN:
        raise VlmtuneError(
            "not enough disk space for the merged model",
            file=output,
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{num_bytes * SPACE_MARGIN / 1e9:.1f} GB",
        )


def _without_adapter(model: Any) -> contextlib.AbstractContextManager[None]:
    return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()


def _written_reader(folding: Folding, plan: OutputPlan) -> Reader:
    """A weight as it will be written, by its name in the model."""
    key_of = dict(folding.placed.key_of) | {name: key for key, name in plan.name_of.items()}
    return lambda name: output_tensor(folding, plan, key_of[name]).float()


def _fold_errors(folding: Folding) -> Iterator[TensorError]:
    for name in sorted(folding.changed):
        expected = folding.expected(name)
        if expected is not None:
            yield error_of(name, folding.folded(name), expected, is_exact=False)


def _shown(errors: Iterable[TensorError]) -> str:
    """The weight that is farthest from what it should be, relative to its size."""
    worst = max(errors, key=lambda error: error.relative, default=None)
    if worst is None or worst.relative == 0:
        return ""
    return f"; farthest from W + its change: {worst.name}, by {worst.relative:.2%}"


def _num_bytes(on_disk: LazyCheckpoint, dtype: torch.dtype | None) -> int:
    """Of the base's weights in `dtype`: what the checkpoint takes, but for a parted tie."""
    size = 0
    for stored in on_disk.placed.stored.values():
        written = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        size += torch.Size(stored.shape).numel() * written.itemsize
    return size


def _copy_record(target: Path, kind: str, folder: Path) -> None:
    """The prompt of a contrastively trained adapter goes with the merged weights."""
    record = (result_of_run(target) if kind == "run" else target) / RECORD_FILE
    if record.is_file():
        shutil.copy(record, folder / RECORD_FILE)
