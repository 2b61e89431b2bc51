"""The weights of a model with its adapter folded in, by closed formulas, for checking a merge.

    LoRA      W + s B A
    DoRA      m (W + s B A) / |W + s B A|, with the norm of every row
    AdaLoRA   W + alpha / (initial_rank + 1e-5) B diag(E) A
    trained in full: the trained copy

PEFT's own merge does the folding, one layer at a time; these formulas are the second opinion that
names a wrong module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from vlmtune.models.adapters.base import ADAPTER
from vlmtune.models.adapters.lora_kernels import FusedLora


def has_formula(layer: Any) -> bool:
    """Whether `merged_weight` covers one of PEFT's layers: a low-rank change of a linear layer."""
    if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), nn.Linear):
        return False
    variant = layer.lora_variant.get(ADAPTER)
    return variant is None or isinstance(variant, FusedLora | DoraLinearVariant)


@torch.no_grad()
def merge_layer(layer: Any) -> dict[str, Tensor]:
    """PEFT's own merge of one of its layers: the base weights by name, changed in place.

    The layer's base weights must be in memory, unquantised, and nobody else's. The layer counts as
    not merged afterwards, so that its weights can be read again.
    """
    layer.merge(safe_merge=False, adapter_names=[ADAPTER])
    layer.merged_adapters.clear()
    base = layer.get_base_layer()
    return {name: parameter.detach() for name, parameter in base.named_parameters()}


def changed_names(path: str, layer: Any) -> list[str]:
    """Names in the base model of what a merge of the layer at `path` may change."""
    names = [name for name, _ in layer.get_base_layer().named_parameters()]
    if has_formula(layer) and not layer.lora_bias.get(ADAPTER, False):
        names = ["weight"]
    return [f"{path}.{name}" for name in names]


def saved_weights(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """(parameter path in the base model, trained weight) of every module trained in full."""
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name, parameter in module.modules_to_save[ADAPTER].named_parameters():
                yield f"{path}.{name}", parameter.detach()


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """The weight (O, I), float32, of one of PEFT's LoRA, DoRA or AdaLoRA linear layers."""
    weight = layer.get_base_layer().weight.float()  # (O, I)
    a, b = _matrix(layer.lora_A[ADAPTER]), _matrix(layer.lora_B[ADAPTER])  # (r, I), (O, r)
    scale = layer.scaling[ADAPTER]
    if hasattr(layer, "lora_E"):
        triplet_scale = scale / (layer.ranknum[ADAPTER].item() + 1e-5)
        return weight + triplet_scale * (b * layer.lora_E[ADAPTER].T.float()) @ a
    changed = weight + scale * (b @ a)
    magnitude = layer.lora_magnitude_vector
    if ADAPTER not in magnitude:
        return changed
    norm = torch.linalg.norm(changed, dim=1, keepdim=True)  # (O, 1)
    return magnitude[ADAPTER].weight.float().unsqueeze(1) * changed / norm


def _matrix(factor: nn.Module | Tensor) -> Tensor:
    weight = factor.weight if isinstance(factor, nn.Module) else factor
    assert isinstance(weight, Tensor)
    return weight.float()
