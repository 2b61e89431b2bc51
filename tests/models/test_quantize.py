"""Quantisation: what is 4-bit, 8-bit or left alone, read off the loaded model."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from tests.tiny_models import save_tiny_model, tiny_config
from vlmtune.errors import VlmtuneError
from vlmtune.models.families import family_for, part_of
from vlmtune.models.load import build_on_meta, load_vlm
from vlmtune.models.quantize import (
    bits_of,
    check_quantization,
    expand_skip,
    finish_quantized,
    quantization_config,
    quantization_report,
)
from vlmtune.models.targets import linear_modules
from vlmtune.recipe.schema import QuantizationSection

FP32 = QuantizationSection(compute_dtype="float32")
FAMILY = family_for("qwen2_5_vl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("models") / "untied", tied=False)


def load(folder, bit: int = 4, **section):
    return load_vlm(
        str(folder),
        quantization_bit=bit,
        quantization=QuantizationSection(**{"compute_dtype": "float32", **section}),
        device="cpu",
    )


def bits_by_part(vlm) -> dict[str, tuple[int, int, int]]:
    return {
        row.part: (row.linear_4bit, row.linear_8bit, row.linear_16bit)
        for row in quantization_report(vlm.model, vlm.family)
    }


def test_nf4_leaves_the_tower_the_connector_and_the_head_in_16_bit(folder):
    assert bits_by_part(load(folder)) == {
        "vision": (0, 0, 2 * 5),
        "connector": (0, 0, 2),
        "language": (2 * 7, 0, 0),
        "lm_head": (0, 0, 1),
    }


def test_the_same_list_as_bare_names_would_quantise_the_tower_and_the_head(folder):
    """Why paths are expanded: upstream matches from the start of the full name, and in silence."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["visual"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}
    )
    quantised = {part_of(p, FAMILY) for p, m in linear_modules(model).items() if bits_of(m) == 4}
    assert quantised == {"vision", "connector", "language", "lm_head"}
    skip = expand_skip(model, ["vision", "connector", "lm_head"], family=FAMILY)
    with pytest.raises(VlmtuneError, match="13 linear layers were not quantised as the recipe"):
        check_quantization(model, 4, FP32, skip_paths=skip)


def test_eight_bit_quantises_the_same_layers(folder):
    vlm = load(folder, bit=8)
    assert bits_by_part(vlm)["language"] == (0, 2 * 7, 0)
    assert bits_by_part(vlm)["vision"] == (0, 0, 2 * 5)
    with torch.no_grad():
        logits = vlm.model(input_ids=torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()


def test_a_shorter_skip_list_quantises_the_tower(folder):
    parts = bits_by_part(load(folder, skip=["connector", "lm_head"]))
    assert parts["vision"] == (2 * 5, 0, 0)
    assert parts["connector"] == (0, 0, 2)


def test_a_group_in_skip_quantises_the_rest_of_its_part(folder):
    parts = bits_by_part(load(folder, skip=["vision.attn", "connector", "lm_head"]))
    assert parts["vision"] == (2 * 3, 0, 2 * 2)  # the MLP in 4 bit, attention not


def test_an_untied_head_is_quantised_only_where_the_recipe_leaves_it_out(folder):
    parts = bits_by_part(load(folder, skip=["vision", "connector"]))
    assert parts["lm_head"] == (1, 0, 0)
    assert bits_by_part(load(folder, skip=[]))["connector"] == (2, 0, 0)


def test_a_tied_head_cannot_be_quantised(tiny_vlm):
    with pytest.raises(VlmtuneError, match="add lm_head to quantization.skip"):
        load(tiny_vlm, skip=["vision", "connector"])
    assert bits_by_part(load(tiny_vlm))["lm_head"] == (0, 0, 1)


def test_a_single_layer_is_skipped_by_its_full_path(folder):
    path = "model.language_model.layers.1.mlp.gate_proj"
    vlm = load(folder, skip=["vision", "connector", "lm_head", path])
    assert bits_of(vlm.model.get_submodule(path)) == 16
    assert bits_by_part(vlm)["language"] == (2 * 7 - 1, 0, 1)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("conector", "did you mean 'connector'"),
        ("visual", "matches no linear layer"),
        ("model.visual.patch_embed", "matches no linear layer"),
        ("model.language_model.layer", r"did you mean 'model\.language_model\.layers"),
    ],
)
def test_a_skip_entry_that_matches_nothing_is_an_error(entry, says):
    model = build_on_meta(tiny_config("qwen2_5_vl"))
    with pytest.raises(VlmtuneError, match=says):
        expand_skip(model, ["vision", entry], family=FAMILY)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_settings_are_in_effect_on_the_loaded_layers(folder, compute_dtype, double_quant):
    vlm = load(folder, compute_dtype=compute_dtype, double_quant=double_quant)
    layer = vlm.model.get_submodule("model.language_model.layers.0.mlp.up_proj")
    assert layer.compute_dtype == getattr(torch, compute_dtype)
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested == double_quant


def test_the_default_is_double_quantised_nf4_with_bfloat16():
    section = QuantizationSection()
    config = quantization_config(4, section, skip_paths=["lm_head"])
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.llm_int8_skip_modules == ["lm_head"]


def test_settings_that_differ_from_the_recipe_are_found(folder):
    """What a misspelt argument would do: the layers compute in another dtype than asked for."""
    vlm = load(folder)
    skip = expand_skip(vlm.model, ["vision", "connector", "lm_head"], family=FAMILY)
    check_quantization(vlm.model, 4, FP32, skip_paths=skip)
    with pytest.raises(VlmtuneError, match=r"computes in torch\.float32, expected bfloat16"):
        check_quantization(vlm.model, 4, QuantizationSection(), skip_paths=skip)
    with pytest.raises(VlmtuneError, match="double quantisation is True"):
        check_quantization(
            vlm.model,
            4,
            QuantizationSection(compute_dtype="float32", double_quant=False),
            skip_paths=skip,
        )


@pytest.mark.parametrize("in_features", [64, 96])
def test_nf4_computes_alike_in_training_and_evaluation_and_keeps_its_gradient(in_features: int):
    # On a CPU with bf16 instructions bitsandbytes' own eval path would do neither.
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        in_features, 32, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False
    )
    model = torch.nn.Sequential(layer).to("cpu")
    finish_quantized(model)
    x = torch.randn(4, in_features)
    expected = model.train()(x)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-6)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_nf4_moves_the_logits_a_little_and_keeps_the_rest_exact(folder):
    ids = torch.arange(12)[None]
    exact, nf4 = load_vlm(str(folder), device="cpu"), load(folder)
    with torch.no_grad():
        expected, got = exact.model(input_ids=ids).logits, nf4.model(input_ids=ids).logits
    moved = (expected - got).abs().max()
    assert 0 < moved < expected.abs().max()
    assert torch.equal(exact.model.lm_head.weight, nf4.model.lm_head.weight)
