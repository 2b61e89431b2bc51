"""A merge of a model held in memory whole, in float32: for weights that transformers converts.

    open -> logits -> fold (PEFT) -> logits -> save_pretrained -> from_pretrained -> logits agree?

Where loading makes weights out of others (fused experts, say), a weight of the model is no tensor
of the files, and saving must undo that for the whole model at once. Slower in nothing, larger in
memory: `merge.py` is the way for every other model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vlmtune.models.adapters.base import tuner_layers
from vlmtune.models.adapters.full import save_model
from vlmtune.models.adapters.merged_weight import merged_weights
from vlmtune.models.load import load_processor, quiet_transformers, read_config
from vlmtune.models.merge_verify import (
    MergeReport,
    Reference,
    build_probes,
    float32_tolerance,
    largest_difference,
    probe_logits,
    require,
)
from vlmtune.models.open import OpenTarget, open_target

MAX_KEPT = 4096
"""Numbers kept of a weight, to compare the written one with."""


def merge_whole(
    target: str | Path,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    shard_size: str,
    data: Sequence[Path],
    trust_remote_code: bool,
) -> MergeReport:
    """Fold the adapter of `target` into its base, write it to the new `folder` and verify it.

    `dtype` None: the one that the base's config names. Raises MergeFailed as `merge` does.
    """
    opened = open_target(
        target,
        dtype=torch.float32,
        device="cpu",
        quantization_bit=16,
        trust_remote_code=trust_remote_code,
    )
    vlm = opened.vlm
    probes = build_probes(vlm, opened.recipe, data)
    model: Any = vlm.model
    adapted = probe_logits(model, probes)
    base = None
    expected: dict[str, Tensor] = {}
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            base = probe_logits(model, probes)
        expected = weight_samples(merged_weights(model))
        model = fold(model)
    written = dtype or _own_dtype(opened, trust_remote_code)
    reference = Reference(written, probes, adapted, base, 0.0, float32_tolerance(adapted))
    folded = probe_logits(model, probes)
    require(
        folded,
        reference,
        what="the folded model, before rounding,",
        blame=_blame(model, expected),
    )
    cast_parameters(model, written)
    save_model(
        dataclasses.replace(vlm, model=model), folder, dtype=written, max_shard_size=shard_size
    )
    cast_parameters(model, torch.float32)
    rounding = largest_difference(probe_logits(model, probes), folded, probes).value
    reference = dataclasses.replace(
        reference, rounding=rounding, tolerance=2 * reference.tolerance + rounding
    )
    del model, vlm, opened
    return _verify(folder, reference, expected, trust_remote_code=trust_remote_code)


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


def weight_samples(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Evenly spaced numbers of every weight: enough to name a wrong module, small to keep."""
    return {name: _spaced(weight).clone() for name, weight in weights}


def _verify(
    folder: Path, reference: Reference, expected: dict[str, Tensor], *, trust_remote_code: bool
) -> MergeReport:
    with quiet_transformers():
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    load_processor(str(folder), trust_remote_code=trust_remote_code)
    logits = probe_logits(model, reference.probes)
    return require(logits, reference, what="the merged checkpoint", blame=_blame(model, expected))


def _blame(model: nn.Module, expected: dict[str, Tensor]) -> Callable[[], str]:
    """The weight that is farthest from W + change, relative to its size, when asked for."""

    def blame() -> str:
        state = dict(model.named_parameters(remove_duplicate=False))
        errors = {
            name: float((_spaced(state[name].detach().float()) - want).norm() / want.norm())
            for name, want in expected.items()
            if name in state
        }
        if not errors:
            return ""
        name = max(errors, key=lambda key: errors[key])
        return f"; farthest from W + its change: {name}, by {errors[name]:.2%}"

    return blame


def _spaced(weight: Tensor) -> Tensor:
    flat = weight.flatten()
    return flat[:: max(1, flat.numel() // MAX_KEPT)]


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def _own_dtype(opened: OpenTarget, trust_remote_code: bool) -> torch.dtype:
    vlm = opened.vlm
    trust = trust_remote_code or (opened.recipe is not None and opened.recipe.trust_remote_code)
    dtype = read_config(vlm.source, revision=vlm.commit, trust_remote_code=trust).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
