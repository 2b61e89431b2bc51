"""LoRA, rsLoRA, DoRA and full training: what is wrapped, trained, saved and restored."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.models.adapted import (
    ADAPTERS,
    METHODS,
    adapted,
    logits_of,
    open_base,
    picture_inputs,
    randomise,
    recipe_for,
    text_inputs,
)
from tests.tiny_models import save_tiny_model
from vlmtune.errors import VlmtuneError
from vlmtune.models.adapters.base import tuner_layers
from vlmtune.models.adapters.registry import build_adapter, method_of
from vlmtune.recipe.schema import QuantizationSection

Q0 = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory):
    return save_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("untied"), tied=False)


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_adapter_changes_nothing(model_folder, method):
    vlm = open_base(model_folder)
    before = logits_of(vlm.model)
    adapter = build_adapter(vlm, recipe_for(model_folder, **METHODS[method]), total_steps=9)
    assert torch.equal(logits_of(adapter.model), before)
    assert (logits_of(adapted(model_folder, **METHODS[method]).model) - before).abs().max() > 0.01


@pytest.mark.parametrize("method", ADAPTERS)
def test_stock_peft_loads_what_save_wrote(model_folder, tmp_path, method):
    adapter = adapted(model_folder, **METHODS[method])
    adapter.save(tmp_path)
    inputs = picture_inputs(open_base(model_folder))
    stock = PeftModel.from_pretrained(open_base(model_folder).model, tmp_path)
    torch.testing.assert_close(logits_of(stock, inputs), logits_of(adapter.model, inputs))
    base = logits_of(open_base(model_folder).model, inputs)
    assert (base - logits_of(stock, inputs)).abs().max() > 0.01


@pytest.mark.parametrize("model_type", ["qwen3_vl", "llava", "idefics3"])
def test_other_architectures_are_wrapped_saved_and_loaded(model_type, tmp_path):
    model = save_tiny_model(model_type, tmp_path / "model")
    adapter = adapted(model, use_dora=True, modules_to_save=["connector", "embeddings"])
    adapter.save(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(open_base(model).model, tmp_path / "adapter")
    inputs = picture_inputs(open_base(model))
    torch.testing.assert_close(logits_of(stock, inputs), logits_of(adapter.model, inputs))


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_state_gives_the_same_logits(model_folder, method):
    trained = adapted(model_folder, **METHODS[method])
    fresh = build_adapter(
        open_base(model_folder), recipe_for(model_folder, **METHODS[method]), total_steps=4
    )
    assert not torch.equal(logits_of(fresh.model), logits_of(trained.model))
    fresh.load_state_dict({name: t.clone() for name, t in trained.state_dict().items()})
    assert torch.equal(logits_of(fresh.model), logits_of(trained.model))


def test_a_state_of_another_adapter_is_refused(model_folder):
    adapter = adapted(model_folder)
    state = adapter.state_dict()
    name = next(iter(state))
    with pytest.raises(VlmtuneError, match="another model or adapter.*1 missing"):
        adapter.load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(VlmtuneError, match=r"another shape.*\(1,\)"):
        adapter.load_state_dict(state | {name: torch.zeros(1)})


def test_only_adapters_train_in_float32_on_a_bfloat16_base(model_folder):
    vlm = open_base(model_folder, dtype=torch.bfloat16)
    recipe = recipe_for(model_folder, use_dora=True, modules_to_save=["connector"])
    adapter = build_adapter(vlm, recipe, total_steps=1)
    trained = {n: p for n, p in adapter.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(".lora_" in n or ".modules_to_save." in n for n in trained)
    frozen = [p for p in adapter.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


def test_magnitudes_start_at_the_float32_norms_of_a_bfloat16_base(model_folder):
    vlm = open_base(model_folder, dtype=torch.bfloat16)
    adapter = build_adapter(vlm, recipe_for(model_folder, use_dora=True), total_steps=1)
    layer = tuner_layers(adapter.model)[Q0]
    weight = layer.get_base_layer().weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert torch.equal(magnitude, torch.linalg.norm(weight.float(), dim=1))
    assert not torch.equal(magnitude, torch.linalg.norm(weight, dim=1).float())  # PEFT's start


def test_a_lowered_rank_is_that_of_its_module_alone(model_folder, tmp_path):
    adapter = adapted(model_folder, lora_target=["q_proj", "k_proj"], rank=48)
    layers = tuner_layers(adapter.model)
    assert layers[Q0].r["default"] == 48  # 64 x 64
    assert layers[Q0.replace("q_proj", "k_proj")].r["default"] == 32  # 64 x 32
    adapter.save(tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert set(pattern.values()) == {32}
    assert all(key.startswith("^model") and key.endswith("k_proj") for key in pattern)


def test_a_pattern_does_not_hit_a_longer_path():
    from peft.utils.other import get_pattern_key

    from vlmtune.models.adapters.base import exact

    assert get_pattern_key([exact("a.b")], "a.b") == exact("a.b")
    assert get_pattern_key([exact("a.b")], "x.a.b") == "x.a.b"  # no pattern
    assert get_pattern_key(["a.b"], "x.a.b") == "a.b"  # what a plain path would do


def test_scaling_is_alpha_over_rank_and_over_its_root_for_rslora(model_folder):
    for changes, expected in (({}, 32 / 4), ({"use_rslora": True}, 32 / 2)):
        layer = tuner_layers(adapted(model_folder, **changes).model)[Q0]
        assert layer.scaling["default"] == expected


@pytest.mark.parametrize("name", ["lm_head", "embeddings", "model.language_model.embed_tokens"])
def test_a_tied_pair_is_trained_as_one_weight(model_folder, tmp_path, name):
    adapter = adapted(model_folder, modules_to_save=[name])
    base = adapter.model.get_base_model()
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    assert head.weight is embeddings.weight
    assert sum("modules_to_save" in n for n in adapter.state_dict()) == 1
    adapter.save(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    pair = [t for n, t in saved.items() if "embed_tokens" in n or "lm_head" in n]
    assert len(pair) == 2 and torch.equal(*pair)


def test_an_untied_head_is_trained_alone(untied_folder):
    adapter = adapted(untied_folder, modules_to_save=["lm_head"])
    base = adapter.model.get_base_model()
    assert not base.get_input_embeddings().weight.requires_grad
    assert base.get_output_embeddings().weight.requires_grad


def test_targets_inside_a_fully_trained_module_get_no_adapter(model_folder):
    adapter = adapted(
        model_folder, lora_target=["all-linear", "connector"], modules_to_save=["connector"]
    )
    assert all("visual" not in path for path in tuner_layers(adapter.model))
    with pytest.raises(VlmtuneError, match="every module of lora_target lies in modules_to_save"):
        adapted(model_folder, lora_target=["connector"], modules_to_save=["connector"])


def test_the_language_part_is_not_copied_away_from_its_tied_head(model_folder, untied_folder):
    changes = {"lora_target": ["vision.attn"], "modules_to_save": ["language"]}
    with pytest.raises(VlmtuneError, match="share their weight with lm_head"):
        adapted(model_folder, **changes)
    adapted(untied_folder, **changes)


def test_a_quantised_module_cannot_be_trained_in_full(model_folder):
    section = QuantizationSection(skip=["vision", "lm_head"])
    vlm = open_base(model_folder, quantization_bit=4, quantization=section)
    recipe = recipe_for(model_folder, modules_to_save=["connector"])
    with pytest.raises(VlmtuneError, match="4-bit weights.*quantization.skip"):
        build_adapter(vlm, recipe, total_steps=1)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_adapters_train_on_a_4bit_base(model_folder, method):
    section = QuantizationSection(compute_dtype="float32")
    vlm = open_base(model_folder, quantization_bit=4, quantization=section)
    recipe = recipe_for(model_folder, lora_target=["all-linear"], **METHODS[method])
    adapter = build_adapter(vlm, recipe, total_steps=4)
    randomise(adapter.model)
    adapter.model(**text_inputs(), use_cache=False).logits.logsumexp(-1).mean().backward()
    trained = [p for p in adapter.model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_full_training_keeps_tied_weights_tied_and_saves_the_bases_dtype(tiny_vlm, tmp_path):
    vlm = open_base(tiny_vlm, dtype=torch.bfloat16)
    recipe = recipe_for(tiny_vlm, lora_target=[], modules_to_save=["lm_head", "connector"])
    assert method_of(recipe) == "full"
    adapter = build_adapter(vlm, recipe, total_steps=1)
    assert vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight
    names = {n for n, p in adapter.model.named_parameters() if p.requires_grad}
    assert all("merger" in n or "embed_tokens" in n for n in names)
    with torch.no_grad():
        vlm.model.lm_head.weight.add_(1.0)
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    saved = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    written = open_base(tmp_path).model.lm_head.weight
    assert torch.equal(written, vlm.model.lm_head.weight.bfloat16().float())
    assert vlm.model.lm_head.weight.dtype == torch.float32  # saving changes nothing


def test_full_training_of_a_quantised_base_is_refused(model_folder):
    vlm = open_base(model_folder, quantization_bit=4)
    recipe = recipe_for(
        model_folder, lora_target=[], modules_to_save=["connector"], quantization_bit=4
    )
    with pytest.raises(VlmtuneError, match="needs an unquantised base"):
        build_adapter(vlm, recipe, total_steps=1)
