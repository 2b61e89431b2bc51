"""Features made apart and kept give the model's own loss and gradients; the tower runs once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.data.clips import write_frames
from tests.models.adapted import randomise, recipe_for
from tests.models.test_forward import conversation
from tests.models.test_packed import GIVEN, distance, loss_and_gradients
from tests.tiny_models import MODEL_TYPES, save_tiny_model
from vlmtune.data.batches import collate, pack
from vlmtune.data.encode import Encoder
from vlmtune.data.processing import kind_of_key, media_keys_of, split_media_items
from vlmtune.data.types import Batch, Sample, Video
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.embedding import EmbeddingForward
from vlmtune.models.families import family_for, part_of
from vlmtune.models.forward import SupervisedForward, base_of
from vlmtune.models.load import VLM, load_vlm
from vlmtune.models.packing import use_packed_attention
from vlmtune.models.vision import VisionFeatures, cacheable_stage, vision_fingerprint
from vlmtune.models.vision_cache import FeatureCache, open_disk_store, open_memory_store
from vlmtune.recipe.data_section import ImageSection

NUM_PICTURES = sum(count for _, _, count in GIVEN)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def vlm(request, tmp_path_factory) -> VLM:
    folder = tmp_path_factory.mktemp(request.param)
    vlm = load_vlm(str(save_tiny_model(request.param, folder)), dtype=torch.float32)
    use_packed_attention(vlm.model)
    return vlm


@pytest.fixture
def samples(vlm: VLM, tmp_path: Path) -> list[Sample]:
    return encoded(vlm, tmp_path)


def encoded(vlm: VLM, folder: Path) -> list[Sample]:
    encoder = Encoder(vlm.processor, max_tokens=512, over_length="error", max_image_pixels=10**6)
    return [encoder.encode(conversation(folder, n, t, num_images=k)) for n, t, k in GIVEN]


def batches_of(vlm: VLM, samples: Sequence[Sample]) -> list[Batch]:
    """The samples packed, and padded."""
    layout = vlm.family.image_batching
    return [
        pack(samples, image_batching=layout),
        collate(samples, pad_token_id=0, image_batching=layout),
    ]


def let_train(vlm: VLM, part: str) -> None:
    for name, parameter in vlm.model.named_parameters():
        wanted = part_of(name, vlm.family) == part
        parameter.requires_grad_(wanted and ("_proj" in name or part != "language"))


def in_memory(vlm: VLM) -> VisionFeatures:
    return VisionFeatures(base_of(vlm.model), vlm.family, FeatureCache([open_memory_store(2**30)]))


def counted_calls(vlm: VLM) -> Iterator[list[int]]:
    """How many rows of pixels each call of the tower had."""
    calls: list[int] = []
    (path,) = vlm.family.parts["vision"]
    tower = vlm.model.get_submodule(path)
    handle = tower.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    yield calls
    handle.remove()


@pytest.mark.parametrize(("part", "level"), [("language", "features"), ("connector", "tower")])
def test_kept_features_give_the_models_own_loss_and_gradients(vlm, samples, part, level):
    let_train(vlm, part)
    for batch in batches_of(vlm, samples):
        plain = SupervisedForward(vlm.model, vlm.family).train()
        expected = loss_and_gradients(plain, [batch])
        forward = SupervisedForward(vlm.model, vlm.family, in_memory(vlm)).train()
        assert forward.features.level == level
        made = loss_and_gradients(forward, [batch])
        kept = loss_and_gradients(forward, [batch])
        assert forward.features.cache.misses == forward.features.cache.hits > 0
        for loss, gradients in (made, kept):
            assert loss == pytest.approx(expected[0], rel=1e-5)
            assert distance(gradients, expected[1]) < 1e-5
        # Made or kept, it is the same bit by bit.
        assert made[0] == kept[0] and distance(made[1], kept[1]) == 0.0


def test_the_features_of_another_picture_are_noticed(vlm, samples):
    """The wrong variant: pictures by their number, not by what is in them."""
    let_train(vlm, "language")
    batch = batches_of(vlm, samples)[0]
    forward = SupervisedForward(vlm.model, vlm.family, in_memory(vlm))
    units = split_media_items(batch.inputs, vlm.family.image_batching)
    keys = tuple(f"image:{number}" for number in range(len(units)))
    right = loss_and_gradients(forward, [replace(batch, media_keys=keys)])
    exchanged = loss_and_gradients(forward, [replace(batch, media_keys=keys[::-1])])
    assert abs(right[0] - exchanged[0]) > 1e-4 or distance(right[1], exchanged[1]) > 1e-4


def test_over_two_epochs_each_picture_goes_through_the_tower_once(vlm, samples):
    let_train(vlm, "language")
    forward = SupervisedForward(vlm.model, vlm.family, in_memory(vlm))
    counter = counted_calls(vlm)
    calls = next(counter)
    for _ in range(2):
        for sample in samples:
            forward(batches_of(vlm, [sample])[0])
    num_units = sum(len(media_keys_of(s.media, vlm.family.image_batching)) for s in samples)
    assert len(calls) == num_units >= NUM_PICTURES
    calls.clear()
    forward.features = VisionFeatures(vlm.model, vlm.family, None)  # without a cache: each time
    for _ in range(2):
        forward(batches_of(vlm, samples)[0])
    assert len(calls) == 2 * num_units
    assert next(counter, None) is None


def rows_of(features: VisionFeatures, batch: Batch) -> Tensor:
    made, rest = features.outputs(batch.inputs, batch.media_keys)
    assert not any(name.startswith("pixel") for name in rest)
    return torch.cat(made["image"].pooler_output)


def test_a_picture_is_the_same_bits_beside_others_and_alone(vlm, samples):
    let_train(vlm, "language")
    features = VisionFeatures(vlm.model, vlm.family)
    layout = vlm.family.image_batching

    pictured = [sample for sample in samples if sample.media]
    alone = torch.cat([rows_of(features, batches_of(vlm, [sample])[0]) for sample in pictured])
    for batch in batches_of(vlm, samples):
        assert torch.equal(rows_of(features, batch), alone)
    keys = [key for sample in samples for key in media_keys_of(sample.media, layout)]
    for batch in batches_of(vlm, samples):
        assert list(media_keys_of(batch.inputs, layout)) == keys


def test_the_towers_window_order_is_undone(tmp_path):
    """The wrong variant: the connector's rows as they come."""
    folder = save_tiny_model("qwen2_5_vl", tmp_path / "model")
    vlm = load_vlm(str(folder), dtype=torch.float32)
    batch = batches_of(vlm, encoded(vlm, tmp_path))[1]
    for part in ("language", "connector"):
        let_train(vlm, part)
        expected = loss_and_gradients(SupervisedForward(vlm.model, vlm.family), [batch])
        unordered = VLM(vlm.model, vlm.processor, replace(vlm.family, feature_order=None), "", None)
        forward = SupervisedForward(vlm.model, vlm.family, in_memory(unordered))
        loss, gradients = loss_and_gradients(forward, [batch])
        assert abs(loss - expected[0]) > 1e-4 or distance(gradients, expected[1]) > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_target": ["connector", "q_proj"], "dropout": 0.5},
        {"lora_target": ["q_proj"], "modules_to_save": ["connector"]},
    ],
)
@pytest.mark.parametrize("model_type", ["qwen3_vl", "smolvlm"])
def test_an_adapted_connector_trains_in_autocast_and_its_dropout_draws_alike(
    tmp_path, model_type, changes
):
    folder = save_tiny_model(model_type, tmp_path / "model")
    vlm = load_vlm(str(folder), dtype=torch.bfloat16)
    adapter = build_adapter(vlm, recipe_for(folder, **changes), total_steps=4)
    randomise(adapter.model, size=0.05)
    forward = SupervisedForward(adapter.model, vlm.family, in_memory(vlm)).train()
    assert forward.features.level == "tower"
    batch = batches_of(vlm, encoded(vlm, tmp_path))[1]
    trained = {n: p for n, p in adapter.model.named_parameters() if p.requires_grad}
    found = []
    for _ in range(2):  # the tower run, then kept: the random numbers are drawn alike
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(torch.autograd.grad(forward(batch), list(trained.values())))
    assert distance(list(found[0]), list(found[1])) == 0.0
    of_connector = [g for n, g in zip(trained, found[0]) if "q_proj" not in n]
    assert of_connector and all(gradient.any() for gradient in of_connector)
    assert forward.training and all(m.training for m in adapter.model.modules())


def test_nothing_is_made_apart_where_the_tower_trains_or_the_family_is_described(vlm):
    let_train(vlm, "vision")
    assert cacheable_stage(vlm.model, vlm.family) is None
    let_train(vlm, "language")
    assert cacheable_stage(vlm.model, vlm.family) == "features"
    model_type = vlm.model.config.model_type
    parts = {"connector": list(vlm.family.parts["connector"])}
    described = family_for(model_type, parts=parts, model=vlm.model)
    assert cacheable_stage(vlm.model, described) is None


def test_the_precision_of_the_products_is_part_of_the_key(vlm, samples):
    let_train(vlm, "language")
    features = in_memory(vlm)
    batch = batches_of(vlm, samples)[1]
    features.outputs(batch.inputs)
    seen = features.cache.misses
    with torch.autocast("cpu", torch.bfloat16):
        features.outputs(batch.inputs)
    assert (features.cache.misses, features.cache.hits) == (2 * seen, 0)


def test_what_the_tower_gives_is_not_taken_for_features(vlm, samples):
    let_train(vlm, "connector")
    tower = in_memory(vlm)
    assert tower.level == "tower" and tower.cache is not None
    batch = batches_of(vlm, samples)[1]
    tower.outputs(batch.inputs)
    seen = tower.cache.misses
    VisionFeatures(vlm.model, vlm.family, tower.cache, level="features").outputs(batch.inputs)
    assert (tower.cache.misses, tower.cache.hits) == (2 * seen, 0)


def test_another_towers_features_on_the_disk_are_not_taken(tmp_path):
    """The wrong variant: a folder whose name says nothing about the weights."""
    folder = save_tiny_model("qwen3_vl", tmp_path / "model")
    one, other = (load_vlm(str(folder), dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        other.model.model.visual.blocks[0].mlp.linear_fc1.weight.mul_(1.5)
    batch = batches_of(one, encoded(one, tmp_path))[0]
    expected = []
    for vlm in (one, other):
        vlm.model.requires_grad_(False)
        expected.append(rows_of(VisionFeatures(vlm.model, vlm.family), batch))

    def from_disk(vlm: VLM, tower: str) -> tuple[Tensor, FeatureCache]:
        store = open_disk_store(tmp_path / "kept", tower, max_bytes=10**7, num_processes=1)
        cache = FeatureCache([store])
        return rows_of(VisionFeatures(vlm.model, vlm.family, cache), batch), cache

    for vlm, right in zip((one, other), expected):
        found, cache = from_disk(
            vlm, vision_fingerprint(vlm.model, vlm.family, ("vision", "connector"))
        )
        assert torch.equal(found, right) and cache.hits == 0 and cache.misses == NUM_PICTURES
    digest = vision_fingerprint(one.model, one.family, ("vision", "connector"))
    found, cache = from_disk(one, digest)
    assert torch.equal(found, expected[0]) and cache.misses == 0
    wrong, cache = from_disk(other, digest)
    assert cache.hits == NUM_PICTURES and not torch.allclose(wrong, expected[1], atol=1e-3)


def test_another_pixel_budget_gives_other_keys(tmp_path):
    folder = save_tiny_model("qwen2_5_vl", tmp_path / "model")
    keys = []
    for most in (None, 32 * 32):
        vlm = load_vlm(str(folder), dtype=torch.float32, image=ImageSection(max_pixels=most))
        keys += [key for s in encoded(vlm, tmp_path) for key in media_keys_of(s.media, "flat")]
    assert len(set(keys)) == len(keys) == 2 * NUM_PICTURES


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_are_kept_beside_pictures_whatever_the_samples_order(tmp_path, model_type):
    vlm = load_vlm(str(save_tiny_model(model_type, tmp_path / "model")), dtype=torch.float32)
    encoder = Encoder(
        vlm.processor,
        max_tokens=512,
        over_length="error",
        max_image_pixels=10**6,
        image_batching=vlm.family.image_batching,
    )
    frames = Video(write_frames(tmp_path, count=6, size=(32, 32)), tmp_path)
    pictured = [conversation(tmp_path, n, "yes", num_images=1) for n in ("a", "b")]
    user = pictured[0].turns[0]
    with_video = replace(user, parts=(frames, *user.parts))  # the video first, its key last
    mixed = replace(pictured[0], turns=(with_video, pictured[0].turns[1]))
    samples = [encoder.encode(mixed), encoder.encode(pictured[1])]
    assert [[kind_of_key(k) for k in s.media_keys] for s in samples] == [
        ["image", "video"],
        ["image"],
    ]
    let_train(vlm, "language")
    for given in (samples, samples[::-1]):
        batch = collate(given, pad_token_id=0, image_batching=vlm.family.image_batching)
        expected = loss_and_gradients(SupervisedForward(vlm.model, vlm.family), [batch])
        forward = SupervisedForward(vlm.model, vlm.family, in_memory(vlm))
        for _ in range(2):
            loss, gradients = loss_and_gradients(forward, [batch])
            assert loss == pytest.approx(expected[0], rel=1e-5)
            assert distance(gradients, expected[1]) < 1e-5
        assert (forward.features.cache.misses, forward.features.cache.hits) == (3, 3)


def test_embeddings_use_kept_features(vlm, samples):
    let_train(vlm, "language")
    batch = batches_of(vlm, samples)[1]
    last = batch.inputs["attention_mask"].sum(dim=1) - 1
    with torch.no_grad():
        expected = EmbeddingForward(vlm.model, vlm.family)(batch.inputs, last)
        features = in_memory(vlm)
        forward = EmbeddingForward(vlm.model, vlm.family, features)
        for _ in range(2):
            assert torch.allclose(forward(batch.inputs, last), expected, atol=1e-5)
    assert features.cache.hits == features.cache.misses > 0


def test_a_resampling_connector_is_given_its_mask():
    """Pictures of several sizes, padded together, through a family whose connector attends."""
    torch.manual_seed(0)
    text = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    perceiver |= {"num_key_value_heads": 2, "resampler_head_dim": 16, "hidden_size": 32}
    config = AutoConfig.for_model(
        "idefics2", text_config=text, vision_config=vision, perceiver_config=perceiver
    )
    model = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    pixels, mask = torch.zeros(2, 2, 3, 32, 24), torch.zeros(2, 2, 32, 24, dtype=torch.int64)
    for at, (height, width) in {(0, 0): (32, 24), (0, 1): (16, 24), (1, 0): (24, 16)}.items():
        pixels[at][:, :height, :width] = torch.randn(3, height, width)
        mask[at][:height, :width] = 1
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask}
    expected = torch.cat(model.model.get_image_features(**inputs).pooler_output)
    features = VisionFeatures(model, family_for("idefics2"))
    made = torch.cat(features.outputs(inputs)[0]["image"].pooler_output)
    assert torch.allclose(made, expected, atol=1e-5)
    inputs["pixel_attention_mask"] = torch.ones_like(mask)  # wrong: padding taken for picture
    wrong = torch.cat(features.outputs(inputs)[0]["image"].pooler_output)
    assert not torch.allclose(wrong, expected, atol=1e-3)
