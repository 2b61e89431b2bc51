"""Training without an adapter, in float32 and in place, and the model folder that it writes.

`lora_target: []` with `modules_to_save`: `[all]` trains every parameter. Weights that the model
shares (tied embeddings) stay shared. The compute dtype is the loop's business (autocast).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from vlmtune.errors import VlmtuneError
from vlmtune.models.adapters.base import load_tensors, trained_tensors
from vlmtune.models.load import VLM, quiet_transformers
from vlmtune.models.targets import resolve_modules_to_save
from vlmtune.recipe.schema import Recipe

MAX_SHARD_SIZE = "5GB"


def save_model(
    vlm: VLM, folder: Path, *, dtype: torch.dtype, max_shard_size: str = MAX_SHARD_SIZE
) -> None:
    """Write `vlm` to `folder` with floating-point weights in `dtype`; `vlm` is unchanged.

    Safetensors shards, config, generation config, tokenizer, processor and chat template.
    """
    model = vlm.model
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        # One copy for tensors that share memory: transformers recognises tied weights by it.
        key = (tensor.data_ptr(), tensor.shape)
        if key not in cast:
            cast[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        state[name] = cast[key]
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    # save_pretrained notes the dtypes in memory; the file's are the ones that count.
    configs = [model.config, *(getattr(model.config, name) for name in model.config.sub_configs)]
    before = [config.dtype for config in configs]
    for config in configs:
        config.dtype = dtype
    model.config.save_pretrained(folder)
    for config, own in zip(configs, before, strict=True):
        config.dtype = own
    vlm.processor.save_pretrained(folder)


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
