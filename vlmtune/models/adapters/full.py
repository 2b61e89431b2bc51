"""Training without an adapter: modules of the unquantised base, in float32, in place.

`lora_target: []` with `modules_to_save`: `[all]` trains every parameter. Weights that the model
shares (tied embeddings) stay shared. The compute dtype is the loop's business (autocast).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from vlmtune.errors import VlmtuneError
from vlmtune.models.adapters.wrapping import load_tensors, trained_tensors
from vlmtune.models.load import VLM
from vlmtune.models.save import save_model
from vlmtune.models.targets import resolve_modules_to_save
from vlmtune.recipe.schema import Recipe


class FullAdapter:
    """The base model itself; implements `Adapter`. `save` writes a model folder in `dtype`."""

    name = "full"

    def __init__(self, vlm: VLM, *, dtype: torch.dtype) -> None:
        self.model: nn.Module = vlm.model
        self._vlm = vlm
        self._dtype = dtype

    def penalty(self) -> Tensor | None:
        return None

    def after_step(self, step: int, *, skipped: Tensor | None = None) -> dict[str, object]:
        return {}

    def no_decay_names(self) -> set[str]:
        return set()

    def state_dict(self) -> dict[str, Tensor]:
        return trained_tensors(self.model)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_tensors(trained_tensors(self.model), state)

    def save(self, folder: Path) -> None:
        save_model(self._vlm, folder, dtype=self._dtype)


def build_full(vlm: VLM, recipe: Recipe, *, total_steps: int) -> FullAdapter:
    """Set `modules_to_save` of `vlm.model` to train, in float32; freeze the rest."""
    if recipe.quantization_bit != 16:
        raise VlmtuneError(
            "training without an adapter (lora_target: []) needs an unquantised base",
            got=f"quantization_bit: {recipe.quantization_bit}",
            expected="quantization_bit: 16",
            do="set quantization_bit: 16, or name modules in lora_target",
        )
    vlm.model.requires_grad_(False)
    for path in _modules(vlm, recipe.modules_to_save):
        # In place: a weight shared with another module stays shared.
        vlm.model.get_submodule(path).float().requires_grad_(True)
    return FullAdapter(vlm, dtype=_checkpoint_dtype(vlm))


def _modules(vlm: VLM, names: list[str]) -> list[str]:
    if "all" in names:
        return [""]
    return resolve_modules_to_save(vlm.model, names, family=vlm.family)


def _checkpoint_dtype(vlm: VLM) -> torch.dtype:
    """The dtype that the base was published in: `vlm.model` may have been loaded in another."""
    config = AutoConfig.from_pretrained(
        vlm.source,
        revision=vlm.commit,
        trust_remote_code=type(vlm.model.config).__module__.startswith("transformers_modules"),
    )
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
