"""The estimate, worked by hand on a model with round numbers of everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.preflight.checking import check_summary
from tests.tiny_models import build_tiny_model
from tests.train.training import write_recipe
from vlmtune.models.families import family_for
from vlmtune.preflight.memory import Memory, MicroBatch, memory_of, optimizer_bytes, weight_bytes
from vlmtune.preflight.model import MetaModel, PartCount, Tower, Trained
from vlmtune.recipe.schema import Recipe

BATCH = MicroBatch(rows=4, longest=25, supervised=10, media=32)


def recipe_of(**keys: Any) -> Recipe:
    values: dict[str, Any] = {"model": "m", "output_dir": "o", "data": {"train": ["a.jsonl"]}}
    train = {"optimizer": "adamw", "precision": "bf16", "gradient_checkpointing": False}
    return Recipe.model_validate(values | {"train": train | keys.pop("train", {})} | keys)


@pytest.fixture
def meta() -> MetaModel:
    return MetaModel(
        model=build_tiny_model("qwen2_5_vl"),
        family=family_for("qwen2_5_vl"),
        commit=None,
        towers={"language": Tower(10, 100, 1000), "vision": Tower(5, 50, 500)},
        vocabulary=2000,
        quantized=frozenset(),
        largest_quantized=0,
    )


def trained_of(
    *, vision: int = 0, language: int = 10_000, in_full: int = 0, quantized: int = 0
) -> Trained:
    parts = {
        "vision": PartCount(1_000_000, 0, vision),
        "language": PartCount(5_000_000, quantized, language),
    }
    return Trained("lora", [], parts, [size for size in (vision, language) if size], in_full)


def estimate(recipe: Recipe, meta: MetaModel, trained: Trained, *batches: MicroBatch) -> Memory:
    return memory_of(recipe, meta, trained, batches or [BATCH], patches_per_media_token=4.0)


def test_an_adapter_on_the_language_part(meta):
    found = estimate(recipe_of(), meta, trained_of())
    # 6 M numbers of 2 bytes; 10,000 trained ones of 4, their gradients, two averages.
    assert (found.weights, found.trained, found.gradients) == (12_000_000, 40_000, 40_000)
    assert found.optimizer == 80_000
    # 100 tokens x 10 layers x 1.2 x 1000 numbers x 2 bytes; a layer of the tower is less.
    assert found.activations == 100 * 10 * 1200 * 2
    # 10 tokens x 2000 words x (bf16 + float32 logits, log-softmax, gradient).
    assert found.logits == 10 * 2000 * 14
    assert found.total == 12_000_000 + 160_000 + 2_400_000 + 280_000


def test_checkpointing_keeps_a_layers_input_and_one_layer(meta):
    found = estimate(recipe_of(train={"gradient_checkpointing": True}), meta, trained_of())
    assert found.activations == (100 * 10 * 100 + 100 * 1200) * 2


def test_a_tower_that_trains_keeps_its_patches(meta):
    found = estimate(recipe_of(), meta, trained_of(vision=500))
    assert found.activations == (100 * 10 * 1200 + 128 * 5 * 600) * 2
    checkpointed = estimate(
        recipe_of(train={"gradient_checkpointing": True}), meta, trained_of(vision=500)
    )
    assert checkpointed.activations == (100 * 10 * 100 + 128 * 5 * 50 + 100 * 1200) * 2


def test_the_micro_batch_that_takes_most_decides(meta):
    small = MicroBatch(rows=1, longest=25, supervised=10, media=8)
    found = estimate(recipe_of(), meta, trained_of(), small, BATCH, small)
    assert found == estimate(recipe_of(), meta, trained_of())
    many_answers = MicroBatch(rows=4, longest=25, supervised=90, media=32)
    assert estimate(recipe_of(), meta, trained_of(), BATCH, many_answers).logits == 90 * 2000 * 14


def test_fp32_doubles_what_is_computed(meta):
    found = estimate(recipe_of(train={"precision": "fp32"}), meta, trained_of())
    assert (found.weights, found.activations) == (24_000_000, 4_800_000)


def test_modules_trained_in_full_are_kept_in_float32(meta):
    found = estimate(recipe_of(), meta, trained_of(language=10_000, in_full=4_000))
    assert found.trained == 6_000 * 4 + 4_000 * 2


def test_quantised_weights_with_their_constants():
    trained = trained_of(quantized=4_000_000)
    nf4 = recipe_of(quantization_bit=4)
    # 4 bits, 8/64 and 32/16384 of a constant: 4.127 bits a number, the rest 2 bytes.
    expected = round(4_000_000 * 4.126953125 / 8 + 1_000_000 * 2)
    assert weight_bytes(nf4, trained)["language"] == expected
    single = recipe_of(quantization_bit=4, quantization={"double_quant": False})
    assert weight_bytes(single, trained)["language"] == 2_250_000 + 2_000_000
    int8 = recipe_of(quantization_bit=8)
    assert weight_bytes(int8, trained)["language"] == 6_000_000


def test_a_quantised_weight_is_unpacked_at_a_time(meta):
    meta, trained = replace(meta, largest_quantized=30_000), trained_of(quantized=4_000_000)
    assert estimate(recipe_of(quantization_bit=4), meta, trained).unpacking == 60_000


def test_8_bit_state_but_for_small_tensors():
    recipe = recipe_of(train={"optimizer": "paged_adamw_8bit"})
    assert optimizer_bytes(recipe, trained_of(vision=4_095, language=4_096)) == 4_095 * 8 + 8_192
    assert optimizer_bytes(recipe_of(), trained_of(vision=4_095, language=4_096)) == 8 * 8_191


def test_the_estimate_follows_the_memory_knob(tiny_vlm: Path, sample_data: Path, tmp_path: Path):
    data = sample_data / "train.jsonl"
    path = write_recipe(tmp_path, tiny_vlm=tiny_vlm, data=data, train__batch_size=128)
    few, many = (
        check_summary(path, f"train.micro_batch_tokens={tokens}")["memory"]["activations"]
        for tokens in (256, 1024)
    )
    # Full packs, of samples of 36 tokens at most.
    assert many / few == pytest.approx(4, rel=0.1)
