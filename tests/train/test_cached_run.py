"""A run from the sample cache is the run without it; the recipe's data keys reach the encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.training import adapter_of, copy_sample, metrics_of, train_once, write_recipe
from vlmtune.data.encode import Encoder
from vlmtune.models.load import load_vlm
from vlmtune.recipe.load import load_recipe
from vlmtune.train.build import build_encoder


@pytest.fixture
def recipe(tmp_path: Path, tiny_vlm: Path, sample_data: Path) -> Path:
    data = copy_sample(sample_data, tmp_path / "data", keep=8)
    return write_recipe(tmp_path / "job", tiny_vlm=tiny_vlm, data=data, rank=4, train__max_steps=4)


def test_a_run_from_the_cache_is_bitwise_the_run_without(recipe, tmp_path, monkeypatch):
    made: list[str] = []
    make = Encoder._make

    def counted(self, conversation):
        made.append(conversation.id)
        return make(self, conversation)

    monkeypatch.setattr(Encoder, "_make", counted)
    runs = {}
    for name, cache in (("without", "off"), ("filling", "disk"), ("filled", "disk")):
        made.clear()
        output = tmp_path / name
        train_once(
            recipe,
            f"output_dir={output}",
            f"data.cache={cache}",
            f"data.cache_dir={tmp_path / 'cache'}",
        )
        losses = [line["loss"] for line in metrics_of(output)]
        runs[name] = losses, adapter_of(output), len(made)
    losses, adapter, num_made = runs["without"]
    assert num_made > 8  # 4 steps of 4 of 8 samples, and the first one to try the model on
    assert runs["filling"][2] == 8 and runs["filled"][2] == 0
    for name in ("filling", "filled"):
        assert runs[name][0] == losses
        assert all(torch.equal(tensor, adapter[key]) for key, tensor in runs[name][1].items())


def test_the_recipes_keys_reach_the_encoder(recipe, tiny_vlm, tmp_path):
    overrides = ["data.train_on=last_turn", "video.fps=1.5", "data.max_tokens=77"]
    overrides += ["data.cache=disk", f"data.cache_dir={tmp_path / 'kept'}"]
    vlm = load_vlm(str(tiny_vlm), dtype=torch.float32)
    encoder = build_encoder(load_recipe(recipe, overrides).recipe, vlm)
    assert (encoder.train_on, encoder.video.fps, encoder.max_tokens) == ("last_turn", 1.5, 77)
    assert (
        encoder._cache is not None and encoder._cache.store.folder == tmp_path / "kept" / "samples"
    )
    plain = build_encoder(load_recipe(recipe).recipe, vlm)
    assert (plain.train_on, plain._cache) == ("assistant", None)
