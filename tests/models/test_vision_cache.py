"""Kept features: bounded, told apart by tower, made anew where torn, shared and safe to kill."""

from __future__ import annotations

import logging
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.models.kept_features import features, key_of, store_in
from tests.tiny_models import build_tiny_model
from vlmtune.models.families import family_for
from vlmtune.models.vision import vision_fingerprint
from vlmtune.models.vision_cache import (
    FeatureCache,
    folder_bytes,
    open_disk_store,
    open_memory_store,
    size_of,
)


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
    """A command of an earlier test may have turned this off."""
    monkeypatch.setattr(logging.getLogger("vlmtune"), "propagate", True)


PARTS = ("vision", "connector")


def same(one: dict[str, Tensor] | None, other: dict[str, Tensor]) -> bool:
    return one is not None and all(torch.equal(one[name], other[name]) for name in other)


def test_memory_takes_up_to_its_bound_and_throws_nothing_out():
    size = size_of(features(0))
    assert size == 4 * 8 * 4 + 2 * 8 * 2
    cache = FeatureCache([open_memory_store(2 * size)])
    for number in range(4):
        assert cache.get(key_of(number)) is None
        cache.put(key_of(number), features(number))
    assert [cache.get(key_of(n)) is not None for n in range(4)] == [True, True, False, False]
    assert cache.figures() == {"hits": 2, "misses": 6, "not_kept": 2, "memory_bytes": 2 * size}


def test_a_view_is_kept_without_what_it_is_a_view_of():
    whole = torch.randn(1000, 8)
    store = open_memory_store(10**6)
    FeatureCache([store]).put("a", {"0": whole[:2]})
    kept = store.get("a")
    assert kept is not None and kept["0"].untyped_storage().nbytes() == 2 * 8 * 4
    whole.zero_()
    assert kept["0"].any()


def test_what_memory_has_no_room_for_goes_to_the_disk(tmp_path):
    cache = FeatureCache([open_memory_store(size_of(features(0))), store_in(tmp_path)])
    for number in range(3):
        cache.put(key_of(number), features(number))
    assert all(same(cache.get(key_of(n)), features(n)) for n in range(3))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    assert cache.figures()["not_kept"] == 0


def test_the_disk_is_bounded_over_runs(tmp_path):
    first = store_in(tmp_path, max_bytes=3000)
    written = [first.put(key_of(n), features(n)) for n in range(20)]
    assert any(written) and not all(written)
    assert folder_bytes(tmp_path) <= 3000
    again = store_in(tmp_path, max_bytes=3000)
    assert same(again.get(key_of(0)), features(0))
    assert not again.put(key_of(30), features(30, rows=40))
    assert folder_bytes(tmp_path) <= 3000


def test_features_of_a_tower_used_long_ago_give_way(tmp_path):
    for number, tower in enumerate(("oldest", "newer")):
        store = store_in(tmp_path, tower=tower)
        assert store.put(key_of(number), features(number))
        os.utime(store.folder, (1000 + number, 1000 + number))
    bound = folder_bytes(tmp_path / "features") + 100
    store = store_in(tmp_path, max_bytes=bound, tower="mine")
    assert (tmp_path / "features" / "oldest").is_dir()  # not before there is need of room
    assert store.put(key_of(5), features(5))
    assert not (tmp_path / "features" / "oldest").exists()
    assert (tmp_path / "features" / "newer").is_dir()
    assert folder_bytes(tmp_path / "features") <= bound


def test_what_gives_way_makes_room_for_one_process_only(tmp_path, monkeypatch):
    old = store_in(tmp_path, tower="old")
    assert all(old.put(key_of(n), features(n)) for n in range(10))
    bound = folder_bytes(tmp_path)
    stores = [store_in(tmp_path, max_bytes=bound, tower="mine") for _ in range(2)]
    # The other process wants room, too, while the first removes.
    removed = shutil.rmtree
    others = [lambda: stores[1].put(key_of(99), features(99))]

    def meanwhile(folder, ignore_errors):
        if others:
            others.pop()()
        removed(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr("vlmtune.files.shutil.rmtree", meanwhile)
    for number in range(40):
        for start, store in zip((100, 200), stores):
            store.put(key_of(start + number), features(start + number))
    assert 0 < folder_bytes(tmp_path) <= bound


def test_features_take_half_of_what_the_disk_has_free_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "vlmtune.models.vision_cache.shutil.disk_usage", lambda _: SimpleNamespace(free=1000)
    )
    store = open_disk_store(tmp_path, "mine", max_bytes=10**6, num_processes=2)
    assert store.max_bytes == 250


def test_a_bound_lower_than_what_is_there_holds_too(tmp_path):
    store = store_in(tmp_path, tower="large")
    assert all(store.put(key_of(n), features(n)) for n in range(10))
    mine = store_in(tmp_path, max_bytes=1000, tower="mine")
    written = [mine.put(key_of(n), features(n)) for n in range(10)]
    assert any(written) and not all(written)
    assert folder_bytes(tmp_path) <= 1000


def test_a_damaged_file_is_made_anew(tmp_path, caplog):
    store = store_in(tmp_path)
    store.put(key_of(1), features(1))
    path = store.place(key_of(1))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert store.get(key_of(1)) is None
    assert "is made again" in caplog.text
    assert store.put(key_of(1), features(1))
    assert same(store.get(key_of(1)), features(1))


def test_a_disk_that_takes_nothing_is_said_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = store_in(tmp_path / "file")
    assert not any(store.put(key_of(n), features(n)) for n in range(3))
    assert caplog.text.count("no more features are cached on disk") == 1
    assert "Not a directory" in caplog.text


def test_the_digest_of_a_tower_is_that_of_its_weights_and_of_what_runs_them():
    model_type = "qwen2_5_vl"
    model, family = build_tiny_model(model_type), family_for(model_type)
    digest = vision_fingerprint(model, family, PARTS)
    assert vision_fingerprint(build_tiny_model(model_type), family, PARTS) == digest
    seen = {digest, vision_fingerprint(model, family, ("vision",))}
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.add_(1)
        assert vision_fingerprint(model, family, PARTS) == digest
        model.model.visual.merger.mlp[0].bias[0] += 1
        seen.add(vision_fingerprint(model, family, PARTS))
        assert vision_fingerprint(model, family, ("vision",)) in seen  # the connector is left out
        model.model.visual.blocks[1].attn.qkv.weight[0, 0] += 1e-3
        seen.add(vision_fingerprint(model, family, PARTS))
    model.config.vision_config.window_size *= 2
    seen.add(vision_fingerprint(model, family, PARTS))
    seen.add(vision_fingerprint(model.to(torch.bfloat16), family, PARTS))
    assert len(seen) == 6
