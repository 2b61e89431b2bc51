"""Base + adapter into one checkpoint that stock transformers loads, verified before it appears.

    open in float32, unquantised -> logits -> fold (PEFT) -> logits -> round, write beside
    -> load what was written with stock transformers -> logits agree? -> rename into place

Never a merge into a quantised base: rounding W + change back to 4 bit loses most of the change.
Memory: the model in float32 once, never twice.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmtune.errors import VlmtuneError
from vlmtune.models.adapters.folded import folded_weights
from vlmtune.models.adapters.wrapping import tuner_layers
from vlmtune.models.embedding import RECORD_FILE
from vlmtune.models.merge_probes import Probe, build_probes, probe_logits
from vlmtune.models.merge_verify import (
    MergeReport,
    Reference,
    float32_tolerance,
    largest_difference,
    require,
    verify_written,
    weight_samples,
)
from vlmtune.models.open import OpenTarget, open_target, result_of_run
from vlmtune.models.save import MAX_SHARD_SIZE, save_model
from vlmtune.models.source import read_config

logger = logging.getLogger("vlmtune")

SPACE_MARGIN = 1.02
"""Bytes on the disk for a byte of weights."""

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


def merge(
    target: str | Path,
    output: Path,
    *,
    dtype: DtypeName = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
    data: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> MergeReport:
    """Fold the adapter of a run or adapter folder into its base and write it to `output`.

    `dtype` auto: the base's own. `data`: samples to compare logits on (else the run's own).
    `output` is complete and verified, or absent. A run without an adapter is written in `dtype`.

    Raises VlmtuneError for an occupied output, too little disk space or a target that cannot be
    opened, MergeFailed where the result's logits are not those of base + adapter.
    """
    check_output(output)
    opened = open_target(
        target,
        dtype=torch.float32,
        device="cpu",
        quantization_bit=16,
        trust_remote_code=trust_remote_code,
    )
    if opened.kind == "model":
        raise VlmtuneError(
            "nothing to merge: this is a model without an adapter",
            file=target,
            expected="a run folder or an adapter folder",
        )
    torch_dtype = _dtype_of(dtype, opened, trust_remote_code)
    check_space(opened.vlm.model, output, torch_dtype)
    probes = build_probes(opened.vlm, opened.recipe, data)
    writing = output.parent / f".writing-{output.name}"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        reference = fold_and_write(
            opened, writing, probes, dtype=torch_dtype, max_shard_size=max_shard_size
        )
        _copy_record(Path(target), opened.kind, writing)
        del opened
        report = verify_written(writing, reference, trust_remote_code=trust_remote_code)
        report = dataclasses.replace(report, output=str(output))
        if output.exists():
            output.rmdir()
        writing.rename(output)
    except OSError as error:
        raise VlmtuneError(f"cannot be written: {error.strerror or error}", file=output) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return report


def fold_and_write(
    opened: OpenTarget,
    folder: Path,
    probes: list[Probe],
    *,
    dtype: torch.dtype,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Reference:
    """Fold the adapter into the float32 base and write it in `dtype`; the logits to expect.

    Uses `opened` up: its model ends folded and rounded. Raises MergeFailed where the folded model's
    logits are not those of base + adapter.
    """
    model: Any = opened.vlm.model
    adapted = probe_logits(model, probes)
    base = None
    expected: dict[str, Tensor] = {}
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            base = probe_logits(model, probes)
        expected = weight_samples(folded_weights(model))
        model = fold(model)
    reference = Reference(dtype, probes, adapted, base, expected, 0.0, float32_tolerance(adapted))
    folded = probe_logits(model, probes)
    require(folded, reference, model, what="the folded model, before rounding,")
    cast_parameters(model, dtype)
    save_model(
        dataclasses.replace(opened.vlm, model=model),
        folder,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    cast_parameters(model, torch.float32)
    rounded = probe_logits(model, probes)
    rounding = largest_difference(rounded, folded, probes).value
    return dataclasses.replace(
        reference, rounding=rounding, tolerance=2 * reference.tolerance + rounding
    )


def fold(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapter merged into its weights; uses `model` up.

    A weight that two modules share and only one of them changes is given to each separately, and
    `tie_word_embeddings` says so.
    """
    for layer in tuner_layers(model).values():
        base = layer.get_base_layer()
        owners = [m for m in model.modules() if getattr(m, "weight", None) is base.weight]
        if len({id(owner) for owner in owners} - {id(layer)}) > 1:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    merged: Any = model.merge_and_unload(safe_merge=True)
    text = merged.config.get_text_config()
    if (merged.config.tie_word_embeddings or text.tie_word_embeddings) and not _is_tied(merged):
        merged.config.tie_word_embeddings = text.tie_word_embeddings = False
    return merged


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast in place. Buffers stay: rotary frequencies are not in a checkpoint, and rounding them
    would move the logits more than rounding the weights does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def check_output(output: Path) -> None:
    """Raise VlmtuneError where something is at `output` already: an empty folder is fine."""
    if output.is_file():
        raise VlmtuneError("the output is a file", file=output, expected="a new folder")
    if output.is_dir() and any(output.iterdir()):
        raise VlmtuneError(
            "the output folder is not empty", file=output, do="name another, or remove it"
        )


def check_space(model: nn.Module, output: Path, dtype: torch.dtype) -> None:
    """Raise VlmtuneError where the disk has no room for the checkpoint."""
    needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VlmtuneError(f"cannot be made: {error.strerror}", file=output.parent) from error
    free = shutil.disk_usage(output.parent).free
    if free < needed * SPACE_MARGIN:
        raise VlmtuneError(
            "not enough disk space for the merged model",
            file=output,
            got=f"{free / 1e9:.1f} GB free",
            expected=f"{needed * SPACE_MARGIN / 1e9:.1f} GB",
        )


def _copy_record(target: Path, kind: str, folder: Path) -> None:
    """The prompt of a contrastively trained adapter goes with the merged weights."""
    record = (result_of_run(target) if kind == "run" else target) / RECORD_FILE
    if record.is_file():
        shutil.copy(record, folder / RECORD_FILE)


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def _dtype_of(name: DtypeName, opened: OpenTarget, trust_remote_code: bool) -> torch.dtype:
    if name != "auto":
        dtype = getattr(torch, name)
    else:
        vlm = opened.vlm
        trust = trust_remote_code or (opened.recipe is not None and opened.recipe.trust_remote_code)
        dtype = read_config(vlm.source, revision=vlm.commit, trust_remote_code=trust).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
