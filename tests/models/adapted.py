"""Small adapted models for tests: built, moved away from the untrained state, asked for logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.models.adapters.base import Adapter
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.load import VLM, load_vlm
from vlmtune.recipe.load import dump_recipe
from vlmtune.recipe.schema import Recipe

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "adalora": {"adalora": {"initial_rank": 6, "target_rank": 3, "warmup": 1, "final": 1}},
    "modules_to_save": {"modules_to_save": ["connector"]},
    "tied_head": {"modules_to_save": ["lm_head"]},
    "full": {"lora_target": [], "modules_to_save": ["all"]},
}
ADAPTERS = [name for name in METHODS if name != "full"]


def recipe_for(model: Path, **changes: Any) -> Recipe:
    values = {
        "model": str(model),
        "output_dir": "run",
        "data": {"train": "train.jsonl"},
        "lora_target": ["q_proj", "vision_mlp"],
        **changes,
    }
    if values["lora_target"] and "adalora" not in values:
        values.setdefault("rank", 4)
    return Recipe.model_validate(values)


def open_base(model: Path, **options: Any) -> VLM:
    return load_vlm(str(model), device="cpu", **options)


def adapted(model: Path, *, total_steps: int = 4, size: float = 0.3, **changes: Any) -> Adapter:
    """An adapter on the model in a folder, with every trained number moved away from its start."""
    torch.manual_seed(0)
    adapter = build_adapter(open_base(model), recipe_for(model, **changes), total_steps=total_steps)
    randomise(adapter.model, size=size)
    return adapter


def randomise(model: nn.Module, *, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def text_inputs() -> dict[str, Tensor]:
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def picture_inputs(vlm: VLM) -> dict[str, Tensor]:
    """One question about a picture, from the probes that a merge is compared on."""
    from vlmtune.models.merge_verify import build_probes

    return build_probes(vlm, None, [])[1].inputs


@torch.no_grad()
def logits_of(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    return model.eval()(**(inputs or text_inputs()), use_cache=False).logits


def write_run(folder: Path, adapter: Adapter, recipe: Recipe) -> Path:
    """A finished run folder, as far as opening one needs it."""
    adapter.save(folder / ("model" if adapter.name == "full" else "adapter"))
    (folder / "recipe.resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder
