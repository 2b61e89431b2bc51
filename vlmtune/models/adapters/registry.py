"""The adapter methods by name. A new method: one file beside this one, and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from vlmtune.models.adapters.adalora import build_adalora
from vlmtune.models.adapters.base import Adapter
from vlmtune.models.adapters.full import build_full
from vlmtune.models.adapters.lora import build_lora
from vlmtune.models.load import VLM
from vlmtune.recipe.schema import Recipe

Method = Literal["lora", "adalora", "full"]

ADAPTERS: dict[Method, Callable[..., Adapter]] = {
    "lora": build_lora,
    "adalora": build_adalora,
    "full": build_full,
}


def method_of(recipe: Recipe) -> Method:
    """The method that the recipe's keys mean."""
    if not recipe.lora_target:
        return "full"
    return "lora" if recipe.adalora is None else "adalora"


def build_adapter(vlm: VLM, recipe: Recipe, *, total_steps: int) -> Adapter:
    """Prepare `vlm.model`, in place, for training by the recipe's method.

    `total_steps` are the optimizer steps of the whole run. Draws from torch's RNG: seed it before.
    Raises VlmtuneError for targets, modules or a schedule that cannot be.
    """
    return ADAPTERS[method_of(recipe)](vlm, recipe, total_steps=total_steps)
