"""Below the lowest trained module nothing is recorded, kept or computed twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.train.training import copy_sample, write_recipe
from vlmtune.data.batches import collate
from vlmtune.data.dataset import load_conversations
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.forward import SupervisedForward, base_of, set_gradient_checkpointing
from vlmtune.models.load import load_vlm
from vlmtune.recipe.load import load_recipe
from vlmtune.train.build import build_encoder


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("lowest", [5, 0])
def test_no_graph_and_no_second_pass_below_the_lowest_trained_module(
    tmp_path: Path, tiny_vlm: Path, sample_data: Path, checkpointed: bool, lowest: int
):
    """With an adapter in the last decoder layer alone; with one in the first, there are both."""
    vlm = load_vlm(str(tiny_vlm), dtype=torch.float32)
    assert vlm.model.config.get_text_config().num_hidden_layers == 6
    target = rf"re:.*language_model\.layers\.{lowest}\..*q_proj"
    data = copy_sample(sample_data, tmp_path / "data", keep=2)
    path = write_recipe(tmp_path, tiny_vlm=tiny_vlm, data=data, rank=2, lora_target=[target])
    recipe = load_recipe(path).recipe
    adapter = build_adapter(vlm, recipe, total_steps=1)
    forward = SupervisedForward(adapter.model, vlm.family).train()
    if checkpointed:
        set_gradient_checkpointing(adapter.model, vlm.family)
    encoder = build_encoder(recipe, vlm)
    conversations, _ = load_conversations(recipe.data.train)
    samples = [encoder.encode(conversation) for conversation in conversations]

    calls: Counter[str] = Counter()
    recorded: dict[str, bool] = {}

    def watch(name: str, layer: nn.Module, inner: nn.Module) -> None:
        def look(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            recorded[name] = first.requires_grad

        layer.register_forward_hook(look)
        # A layer's own hooks stay outside of what checkpointing repeats.
        inner.register_forward_pre_hook(lambda *_: calls.update([name]))

    base = base_of(adapter.model)
    layers, blocks = base.model.language_model.layers, base.model.visual.blocks
    for number, layer in enumerate(layers):
        watch(f"language.{number}", layer, layer.input_layernorm)
    for number, block in enumerate(blocks):
        watch(f"vision.{number}", block, block.norm1)
    loss = forward(collate(samples, pad_token_id=0, image_batching="flat"))
    above = {f"language.{number}" for number in range(lowest, len(layers))}
    assert {name for name, is_so in recorded.items() if is_so} == above
    loss.backward()
    repeated = above if checkpointed else set()
    assert len(recorded) == len(layers) + len(blocks)
    assert calls == Counter({name: 1 + (name in repeated) for name in recorded})
