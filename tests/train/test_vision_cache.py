"""A run that keeps its pictures' features is the run that does not, and can be resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.train.training import adapter_of, copy_sample, metrics_of, train_once, write_recipe
from vlmtune.errors import VlmtuneError
from vlmtune.files import DiskStore, MemoryStore
from vlmtune.models.load import load_vlm
from vlmtune.recipe.load import load_recipe
from vlmtune.train.build import build_encoder, build_vision_features
from vlmtune.train.checkpoint import fingerprint_of

NUM_SAMPLES = 8


@pytest.fixture
def recipe(tmp_path: Path, tiny_vlm: Path, sample_data: Path) -> Path:
    data = copy_sample(sample_data, tmp_path / "data", keep=NUM_SAMPLES)
    return write_recipe(
        tmp_path / "job",
        tiny_vlm=tiny_vlm,
        data=data,
        rank=4,
        dropout=0.1,
        lora_target=["q_proj", "v_proj"],
        train__max_steps=6,
    )


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run)]


def count_tower_calls(monkeypatch) -> list[int]:
    """A list that grows by the pictures of each call of the vision tower."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as model

    calls: list[int] = []
    forward = model.Qwen2_5_VisionTransformerPretrainedModel.forward

    def counted(self, hidden_states, grid_thw, **kwargs):
        calls.append(len(grid_thw))
        return forward(self, hidden_states, grid_thw, **kwargs)

    monkeypatch.setattr(model.Qwen2_5_VisionTransformerPretrainedModel, "forward", counted)
    return calls


def test_a_run_with_kept_features_is_bitwise_the_run_without(recipe, tmp_path, monkeypatch):
    calls = count_tower_calls(monkeypatch)
    runs, summaries, num_calls = {}, {}, {}
    for name, mode in (("off", "off"), ("memory", "memory"), ("disk", "disk"), ("again", "disk")):
        calls.clear()
        runs[name] = tmp_path / name
        given = [f"output_dir={runs[name]}", f"train.vision_cache={mode}"]
        summaries[name] = train_once(recipe, *given, f"data.cache_dir={tmp_path / 'cache'}")
        num_calls[name] = sum(calls)
    for name in ("memory", "disk", "again"):
        assert losses_of(runs[name]) == losses_of(runs["off"])
        kept, plain = adapter_of(runs[name]), adapter_of(runs["off"])
        assert all(torch.equal(kept[key], plain[key]) for key in plain)
    # 6 steps of 4 of 8 samples, three epochs, and the probe: the model's own way, ours and once
    # with gradients. Kept, each picture goes through the tower once, besides the model's own way.
    pictures = len(
        {
            json.loads(line)["messages"][0]["content"][0]["image"]
            for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()
        }
    )
    assert num_calls["off"] == 24 + 3
    assert num_calls["memory"] == num_calls["disk"] == pictures + 1
    assert num_calls["again"] == 1
    assert summaries["off"]["vision_cache"] is None
    figures = summaries["memory"]["vision_cache"]
    assert (figures["misses"], figures["hits"]) == (pictures, 26 - pictures)
    assert figures["memory_bytes"] > 0 and figures["not_kept"] == 0
    assert summaries["again"]["vision_cache"]["misses"] == 0


def test_a_full_cache_changes_nothing(recipe, tmp_path):
    train_once(recipe, f"output_dir={tmp_path / 'whole'}", "train.vision_cache=memory")
    given = ["train.vision_cache=memory", "train.vision_cache_bytes=5000"]
    summary = train_once(recipe, f"output_dir={tmp_path / 'full'}", *given)
    assert summary["vision_cache"]["not_kept"] > 0
    assert summary["vision_cache"]["memory_bytes"] <= 5000
    assert losses_of(tmp_path / "full") == losses_of(tmp_path / "whole")


@pytest.mark.parametrize("target", [["q_proj"], ["q_proj", "connector"]])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(recipe, tmp_path, target):
    given = ["train.vision_cache=memory", f"lora_target={target}", "train.keep_checkpoints=5"]
    train_once(recipe, f"output_dir={tmp_path / 'whole'}", *given)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000003"
    train_once(recipe, f"output_dir={tmp_path / 'half'}", *given, resume=str(checkpoint))
    whole, half = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "half")
    assert all(torch.equal(whole[key], half[key]) for key in whole)
    assert losses_of(tmp_path / "half")[-3:] == losses_of(tmp_path / "whole")[-3:]


def test_features_of_a_tower_that_trains_are_refused(recipe, tmp_path, caplog):
    trains = "lora_target=[q_proj, vision_mlp]"
    for mode in ("memory", "disk"):
        with pytest.raises(VlmtuneError, match="cannot be cached: the vision tower trains"):
            train_once(recipe, trains, f"train.vision_cache={mode}")
    assert not (tmp_path / "job" / "run").exists()
    summary = train_once(recipe, trains, "train.max_steps=1")
    assert summary["vision_cache"] is None


@pytest.mark.parametrize(
    ("mode", "processes", "stores"),
    [
        ("auto", 1, [MemoryStore, DiskStore]),
        ("auto", 2, [DiskStore, MemoryStore]),
        ("memory", 2, [MemoryStore]),
        ("disk", 1, [DiskStore]),
    ],
)
def test_where_features_are_kept(recipe, tiny_vlm, tmp_path, caplog, mode, processes, stores):
    given = [f"train.vision_cache={mode}", "train.vision_cache_bytes=1000"]
    loaded = load_recipe(recipe, [*given, f"data.cache_dir={tmp_path / 'cache'}"]).recipe
    vlm = load_vlm(str(tiny_vlm), dtype=torch.float32)
    vlm.model.requires_grad_(False)
    accelerator = SimpleNamespace(num_processes=processes)
    logging.getLogger("vlmtune").propagate = True
    with caplog.at_level("INFO", logger="vlmtune"):
        features = build_vision_features(loaded, vlm=vlm, accelerator=accelerator)
    assert [type(store) for store in features.cache.stores] == stores
    assert all(store.max_bytes == 1000 // processes for store in features.cache.stores)
    words = {MemoryStore: "in memory", DiskStore: "on disk"}
    expected = ", then ".join(f"{words[store]} (up to 0.0 GB)" for store in stores)
    assert f"vision cache: picture features are kept {expected}" in caplog.text


def test_memory_takes_half_of_what_is_free_at_most(recipe, tiny_vlm, monkeypatch):
    vlm = load_vlm(str(tiny_vlm), dtype=torch.float32)
    vlm.model.requires_grad_(False)
    loaded = load_recipe(recipe, ["train.vision_cache=memory"]).recipe
    free = SimpleNamespace(available=100_000)
    monkeypatch.setattr("vlmtune.train.build.psutil.virtual_memory", lambda: free)
    accelerator = SimpleNamespace(num_processes=2)
    features = build_vision_features(loaded, vlm=vlm, accelerator=accelerator)
    assert features.cache.stores[0].max_bytes == 25_000  # of each process


def test_samples_have_keys_where_features_are_kept(recipe, tiny_vlm):
    vlm = load_vlm(str(tiny_vlm), dtype=torch.float32)
    loaded = load_recipe(recipe).recipe
    assert build_encoder(loaded, vlm).image_batching is None  # all of it trains
    vlm.model.requires_grad_(False)
    assert build_encoder(loaded, vlm).image_batching == "flat"
    off = load_recipe(recipe, ["train.vision_cache=off"]).recipe
    assert build_encoder(off, vlm).image_batching is None


def test_where_features_are_kept_may_change_between_a_stop_and_its_resume(recipe):
    one = fingerprint_of(load_recipe(recipe).recipe, {})
    changed = ["train.vision_cache=disk", "train.vision_cache_bytes=1"]
    assert fingerprint_of(load_recipe(recipe, changed).recipe, {}) == one
