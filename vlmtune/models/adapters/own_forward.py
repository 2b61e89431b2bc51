"""Which of PEFT's layers compute as we do, and what that makes needless.

Before training and after loading, `use_own_forward` gives LoRA's and DoRA's layers the forward
passes of `fused.py` and `dora.py`; layers of any other kind stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear, LoraVariant
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from vlmtune.models.adapters.dora import FusedDora
from vlmtune.models.adapters.fused import FusedLora
from vlmtune.models.adapters.wrapping import ADAPTER, tuner_layers


def use_own_forward(model: PeftModel) -> int:
    """Let the LoRA and DoRA layers of `model` compute as we do; how many there are.

    No number of the model changes, and neither does what it saves or merges. The computation is
    PEFT's in exact arithmetic; in 16 bit the adapter's products are rounded to the base's dtype.
    """
    count = 0
    for layer in tuner_layers(model).values():
        variant = _own_variant(layer)
        if variant is not None:
            layer.lora_variant[ADAPTER] = variant
            layer.cast_input_dtype_enabled = False
            count += 1
    return count


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


def _own_variant(layer: Any) -> LoraVariant | None:
    """Ours, for a linear layer with plain LoRA or DoRA as its only adapter; None for any other."""
    if type(layer) not in (Linear, Linear4bit, Linear8bitLt):
        return None
    if not isinstance(layer.get_base_layer(), nn.Linear) or list(layer.lora_A) != [ADAPTER]:
        return None
    if layer.lora_bias[ADAPTER]:
        return None
    variant = layer.lora_variant.get(ADAPTER)
    if variant is None:
        return FusedLora()
    return FusedDora() if type(variant) is DoraLinearVariant else None
