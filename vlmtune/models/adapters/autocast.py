"""Whether training needs autocast: not where nothing but LoRA's or DoRA's own factors trains."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn

from vlmtune.models.adapters.dora import FusedDora
from vlmtune.models.adapters.fused import FusedLora
from vlmtune.models.adapters.wrapping import ADAPTER, tuner_layers


def needs_autocast(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `model` holds weights in another dtype than `dtype` that do not cast themselves.

    Our LoRA and DoRA compute in their input's dtype with float32 factors. Modules trained in full
    are float32 copies, and AdaLoRA's factors are float32: those need autocast, as does a base
    model that keeps some layers in another dtype. 4-bit and 8-bit weights do not count.
    """
    casting: set[int] = set()
    if isinstance(model, PeftModel):
        for layer in tuner_layers(model).values():
            # AdaLoRA's layers have no variant of ours.
            if isinstance(layer.lora_variant.get(ADAPTER), FusedLora | FusedDora):
                adapters = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
                casting |= {id(p) for module in adapters for p in module.parameters()}
    return any(
        p.is_floating_point() and p.dtype != dtype and id(p) not in casting
        for p in model.parameters()
    )
