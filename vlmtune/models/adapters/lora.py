"""LoRA, rsLoRA and DoRA: PEFT's layers, with forward passes of our own in them (`lora_kernels.py`).

LoRA: Hu et al. 2021, arXiv 2106.09685, eq. 3: `W x + (alpha / r) B A x`. rsLoRA: Kalajdzievski
2023, arXiv 2312.03732: `alpha / sqrt(r)`. DoRA: Liu et al. 2024, arXiv 2402.09353, eq. 5, with the
norm taken as a constant in the backward pass (section 4.3).

A module whose rank was lowered to its size is scaled by its own, lowered rank: `alpha / r` with the
`r` it has, as in PEFT and every server that reads `rank_pattern`.
"""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import ProcessorMixin

from vlmtune.models.adapters.base import (
    check_wrapped,
    exact,
    load_tensors,
    plain_number,
    plan_modules,
    trained_tensors,
    wrap,
    write_adapter,
)
from vlmtune.models.adapters.lora_kernels import install_kernels, set_exact_magnitudes
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import Recipe


class LoraAdapter:
    """A PEFT LoRA model; implements `Adapter`. `save` puts the processor beside the adapter."""

    name = "lora"

    def __init__(self, model: PeftModel, processor: ProcessorMixin) -> None:
        self.model = model
        self._processor = processor

    def penalty(self) -> Tensor | None:
        return None

    def after_step(self, step: int, *, skipped: Tensor | None = None) -> dict[str, object]:
        return {}

    def no_decay_names(self) -> set[str]:
        """DoRA's magnitudes: decay would shrink the base model's weights, not the change."""
        return {n for n in trained_tensors(self.model) if "lora_magnitude_vector" in n}

    def state_dict(self) -> dict[str, Tensor]:
        return trained_tensors(self.model)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_tensors(trained_tensors(self.model), state)

    def save(self, folder: Path) -> None:
        write_adapter(self.model, folder)
        self._processor.save_pretrained(folder)


def build_lora(vlm: VLM, recipe: Recipe, *, total_steps: int) -> LoraAdapter:
    """Wrap `vlm.model` in place as the recipe says. Raises VlmtuneError for unusable targets."""
    plan = plan_modules(vlm, recipe, rank=recipe.rank)
    lowered = {exact(t.path): t.rank for t in plan.targets if t.rank != recipe.rank}
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=plain_number(recipe.alpha),
        lora_dropout=recipe.dropout,
        target_modules=[t.path for t in plan.targets],
        rank_pattern=lowered,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
    )
    model = wrap(vlm, config, plan)
    check_wrapped(model, plan)
    if recipe.use_dora:
        set_exact_magnitudes(model)
    num_own = install_kernels(model)
    assert num_own == len(plan.targets), (num_own, len(plan.targets))
    return LoraAdapter(model, vlm.processor)
