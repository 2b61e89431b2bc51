"""Loading: the five architectures from folders, and every folder that cannot be loaded."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from tests.tiny_models import MODEL_TYPES, build_tiny_model, build_tiny_processor, save_tiny_model
from vlmtune.errors import VlmtuneError
from vlmtune.models.load import load_processor, load_vlm, pixel_budget, set_pixel_budget
from vlmtune.recipe.data_section import ImageSection


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_saved_model_loads_with_the_same_weights(model_type, tmp_path):
    vlm = load_vlm(str(save_tiny_model(model_type, tmp_path)), device="cpu")
    expected = build_tiny_model(model_type).state_dict()
    loaded = vlm.model.state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not torch.equal(
        loaded["lm_head.weight"], build_tiny_model(model_type, seed=1).lm_head.weight
    )
    assert model_type in vlm.family.model_types
    assert not vlm.model.training
    assert vlm.commit is None


def test_the_embedded_default_loads_in_the_dtype_asked_for(tiny_vlm):
    for dtype in (torch.float32, torch.bfloat16):
        vlm = load_vlm(str(tiny_vlm), dtype=dtype, device="cpu")
        assert {p.dtype for p in vlm.model.parameters()} == {dtype}


@pytest.fixture
def folder(tiny_vlm, tmp_path) -> Path:
    return shutil.copytree(tiny_vlm, tmp_path / "model")


def refused(source: object, **options) -> str:
    with pytest.raises(VlmtuneError) as error:
        load_vlm(str(source), device="cpu", **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("./nowhere", "no such model folder"),
        ("/nowhere/at/all", "no such model folder"),
        ("a/b/c", "no such model folder"),
        ("nobody/nothing", "the hub cannot be reached"),
        ("not a name!", "check the spelling of the hub id"),
    ],
)
def test_a_source_that_does_not_exist_says_so(source, says):
    assert says in refused(source)


def test_a_folder_without_config_is_no_model(folder):
    (folder / "config.json").unlink()
    assert "it has no config.json" in refused(folder)


def write_adapter_config(folder: Path, base: object) -> None:
    text = json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)})
    (folder / "adapter_config.json").write_text(text)


def test_a_base_with_an_adapter_beside_it_is_refused_with_both_ways_on(folder):
    load_vlm(str(folder), device="cpu")  # beside: without the adapter it loads
    write_adapter_config(folder, folder)
    for source in (folder, f"{folder}/"):
        text = refused(source)
        assert text.startswith(str(folder))
        assert "has an adapter beside it" in text
        assert "move adapter_config.json" in text and "vlmtune merge" in text


def test_an_adapter_alone_is_no_base(folder):
    (folder / "config.json").unlink()
    write_adapter_config(folder, "some/base")
    assert "vlmtune merge" in refused(folder)


def test_a_hub_model_with_an_adapter_beside_it_is_refused(folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some--base"
    snapshot = shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    load_vlm("some/base", device="cpu")  # beside: without the adapter it loads
    write_adapter_config(snapshot, "other/base")
    text = refused("some/base")
    assert "some/base: the base model has an adapter beside it" in text
    assert "hf download some/base" in text and "vlmtune merge" in text


def test_a_file_is_no_model(folder):
    assert "the model is a file" in refused(folder / "config.json")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{broken", "check config.json"),
        ("{}", "check config.json"),
        ('{"model_type": "nobody"}', "newer transformers"),
        ('{"model_type": "llama"}', "is not a vision-language model; got: model_type 'llama'"),
    ],
)
def test_a_config_that_is_no_vlms_is_an_error(folder, config, says):
    (folder / "config.json").write_text(config)
    assert says in refused(folder)


def test_a_vlm_of_an_unknown_family_is_an_error_that_lists_its_modules(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "vipllava"}))
    text = refused(folder)
    assert "no family file knows the model type 'vipllava'" in text
    assert "model.vision_tower" in text


def test_an_unknown_family_loads_with_parts(tmp_path, monkeypatch):
    """LLaVA without its line in the registry: the same model, described by the recipe."""
    save_tiny_model("llava", tmp_path)
    from vlmtune.models.families import FAMILIES

    llava = FAMILIES["llava"]
    monkeypatch.delitem(FAMILIES, "llava")
    vlm = load_vlm(str(tmp_path), device="cpu", parts=llava.parts)
    assert vlm.family.parts == llava.parts
    assert set(vlm.family.mlp["vision"]) == set(llava.mlp["vision"])


def test_a_quantised_checkpoint_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantised already" in refused(folder)


def test_weights_as_pickle_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    text = refused(folder)
    assert "only .bin files are there" in text
    assert "safetensors" in text


def test_missing_weight_files_are_an_error(folder):
    (folder / "model.safetensors").unlink()
    assert "the weights cannot be loaded" in refused(folder)


def test_a_damaged_weight_file_is_an_error(folder):
    (folder / "model.safetensors").write_bytes(b"not one")
    assert "a weight file is damaged" in refused(folder)


def rewrite_weights(folder: Path, change) -> str:
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("gate_proj.weight"))
    change(weights, name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return name


def test_a_missing_weight_is_an_error_and_not_a_random_number(folder):
    rewrite_weights(folder, lambda weights, name: weights.pop(name))
    text = refused(folder)
    assert "1 weight of" in text
    assert "gate_proj.weight" in text


def test_a_weight_of_another_shape_is_an_error_that_names_it(folder):
    rewrite_weights(folder, lambda weights, name: weights.update({name: torch.zeros(3)}))
    text = refused(folder)
    assert "of another shape than config.json says" in text
    assert "gate_proj.weight" in text


def test_weights_without_a_place_are_counted(folder, caplog):
    rewrite_weights(folder, lambda weights, name: weights.update({"extra.one": torch.zeros(3)}))
    with caplog.at_level(logging.WARNING, "vlmtune"):
        load_vlm(str(folder), device="cpu")
    assert [r.getMessage() for r in caplog.records if "extra.one" in r.getMessage()]


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("tokenizer.json", "the folder has no tokenizer"),
        ("processor_config.json", "the processor cannot be loaded"),
        ("chat_template.jinja", "has no chat template"),
    ],
)
def test_missing_processor_files_are_an_error(folder, file, says):
    (folder / file).unlink()
    assert says in refused(folder)


def test_loading_prints_nothing(tiny_vlm, capfd):
    load_vlm(str(tiny_vlm), device="cpu")
    assert capfd.readouterr() == ("", "")


PICTURE = Image.new("RGB", (200, 100), "red")


def num_patches(processor) -> int:
    return len(processor.image_processor(images=[PICTURE], return_tensors="pt")["pixel_values"])


def test_the_pixel_budget_bounds_what_the_model_sees(tiny_vlm):
    patch_area = 8 * 8
    small = load_processor(str(tiny_vlm), image=ImageSection(min_pixels=256, max_pixels=1024))
    large = load_processor(str(tiny_vlm), image=ImageSection(max_pixels=200 * 100))
    assert num_patches(small) * patch_area <= 1024
    assert 1024 < num_patches(large) * patch_area <= 200 * 100
    assert num_patches(load_processor(str(tiny_vlm))) * patch_area <= 64 * 64  # its own


def test_one_side_of_the_budget_keeps_the_other(tiny_vlm):
    own = pixel_budget(load_processor(str(tiny_vlm)))
    assert own == (1024, 4096)
    assert pixel_budget(load_processor(str(tiny_vlm), image=ImageSection(max_pixels=2048))) == (
        1024,
        2048,
    )


def test_the_pixel_budget_is_saved_with_the_processor(tiny_vlm, tmp_path):
    processor = load_processor(str(tiny_vlm), image=ImageSection(min_pixels=256, max_pixels=2048))
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert pixel_budget(again) == (256, 2048)
    assert num_patches(again) == num_patches(processor)


def test_an_empty_pixel_budget_is_an_error(tiny_vlm):
    with pytest.raises(VlmtuneError, match="min_pixels 5000, max_pixels 4096 .the processor's own"):
        load_processor(str(tiny_vlm), image=ImageSection(min_pixels=5000))


@pytest.mark.parametrize("model_type", ["llava", "smolvlm"])
def test_a_pixel_budget_without_effect_is_an_error_that_names_who_has_one(model_type):
    """CLIP's and Idefics' sizes have the same keys and mean edge lengths."""
    processor = build_tiny_processor(model_type)
    with pytest.raises(VlmtuneError, match=r"no effect.*Qwen2-VL, Qwen2\.5-VL, Qwen3-VL"):
        set_pixel_budget(processor, min_pixels=None, max_pixels=4096)
    set_pixel_budget(processor, min_pixels=None, max_pixels=None)  # nothing asked, nothing wrong
