"""Runs, adapters and models opened, and everything that must not be opened in silence."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.models.adapted import METHODS, adapted, logits_of, open_base, recipe_for, write_run
from tests.tiny_models import save_tiny_model
from vlmtune.errors import VlmtuneError
from vlmtune.models.load import pixel_budget, set_pixel_budget
from vlmtune.models.merge_write import open_lazily
from vlmtune.models.open import open_target
from vlmtune.models.quantize import bits_of

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def saved_adapter(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    adapted(model_folder, modules_to_save=["connector"]).save(folder)
    return folder


@pytest.fixture
def adapter_folder(saved_adapter, tmp_path):
    return shutil.copytree(saved_adapter, tmp_path / "adapter")


def opened(target, **options):
    return open_target(target, dtype=torch.float32, device="cpu", **options)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_opens_with_what_it_trained(model_folder, tmp_path, method):
    adapter = adapted(model_folder, **METHODS[method])
    recipe = recipe_for(model_folder, **METHODS[method])
    target = opened(write_run(tmp_path, adapter, recipe))
    assert (target.kind, target.recipe) == ("run", recipe)
    assert torch.equal(logits_of(target.vlm.model), logits_of(adapter.model))
    base = logits_of(open_base(model_folder).model)
    assert (logits_of(target.vlm.model) - base).abs().max() > 0.01
    assert not any(p.requires_grad for p in target.vlm.model.parameters())
    assert not target.vlm.model.training


def test_an_adapter_and_a_model_open_too(model_folder, adapter_folder):
    assert opened(adapter_folder).kind == "adapter"
    assert opened(model_folder).kind == "model"


@pytest.fixture
def both_folder(model_folder, adapter_folder, tmp_path):
    """A base model and, beside it, an adapter on `model_folder`."""
    folder = shutil.copytree(model_folder, tmp_path / "both")
    return shutil.copytree(adapter_folder, folder, dirs_exist_ok=True)


def test_an_adapter_with_a_model_beside_it_is_opened_on_its_own_base_and_says_so(
    both_folder, model_folder, adapter_folder, tmp_path, caplog
):
    caplog.set_level(logging.WARNING, "vlmtune")
    expected = logits_of(opened(adapter_folder).vlm.model)
    assert not caplog.messages
    for weights in ("model.safetensors", "config.json"):
        shutil.copy(model_folder / weights, both_folder / weights)
    target = opened(both_folder)
    assert target.kind == "adapter"
    assert torch.equal(logits_of(target.vlm.model), expected)
    [said] = caplog.messages
    assert str(both_folder) in said and str(model_folder) in said and "not used" in said
    caplog.clear()
    open_lazily(both_folder, tmp_path / "converted")
    assert caplog.messages == [said]


def test_an_adapter_that_names_the_folder_it_lies_in_as_its_base_is_refused(
    both_folder, model_folder, adapter_folder, tmp_path
):
    def lazily(target):
        return open_lazily(target, tmp_path / "converted")

    # What is refused: transformers attaches the adapter by itself.
    attached = AutoModelForImageTextToText.from_pretrained(both_folder)
    assert any("lora_A" in name for name in attached.state_dict())
    config = json.loads((both_folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(both_folder)
    for folder in (both_folder, adapter_folder):
        (folder / "adapter_config.json").write_text(json.dumps(config))
        for open_it in (opened, lazily):
            with pytest.raises(VlmtuneError, match=f"^{both_folder}: .*an adapter beside it"):
                open_it(folder)
    # The way on that the message names.
    (both_folder / "adapter_config.json").unlink()
    expected = logits_of(opened(both_folder).vlm.model)
    assert (logits_of(opened(adapter_folder).vlm.model) - expected).abs().max() > 0.01
    assert lazily(adapter_folder).files.kind == "adapter"


def test_a_run_is_quantised_as_in_training_unless_told(model_folder, tmp_path):
    adapter = adapted(model_folder)
    recipe = recipe_for(model_folder, quantization_bit=4)
    run = write_run(tmp_path, adapter, recipe)
    bits = {bits_of(m) for m in opened(run).vlm.model.modules()}
    assert bits == {4, 16}
    bits = {bits_of(m) for m in opened(run, quantization_bit=16).vlm.model.modules()}
    assert bits == {16}


def test_the_processor_is_the_adapters_with_its_pixel_budget(model_folder, adapter_folder):
    vlm = open_base(model_folder)
    set_pixel_budget(vlm.processor, min_pixels=256, max_pixels=1024)
    vlm.processor.save_pretrained(adapter_folder)
    assert pixel_budget(opened(adapter_folder).vlm.processor) == (256, 1024)
    assert pixel_budget(opened(model_folder).vlm.processor) != (256, 1024)


def test_a_run_opens_after_its_data_is_gone(model_folder, tmp_path):
    recipe = recipe_for(model_folder, data={"train": str(tmp_path / "gone.jsonl")})
    run = write_run(tmp_path, adapted(model_folder), recipe)
    assert opened(run).recipe == recipe


def test_an_unfinished_run_names_its_checkpoints(model_folder, tmp_path):
    run = write_run(tmp_path, adapted(model_folder), recipe_for(model_folder))
    shutil.rmtree(run / "adapter")
    with pytest.raises(VlmtuneError, match="no checkpoint either.*`vlmtune train RECIPE`"):
        opened(run)
    (run / "checkpoints" / "step-000004").mkdir(parents=True)
    with pytest.raises(VlmtuneError, match="not finished.*step-000004.*--resume auto"):
        opened(run)


def test_a_folder_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(VlmtuneError, match="not a run, an adapter or a model"):
        opened(tmp_path)


def rename(folder, old, new, *, count=None):
    tensors = load_file(folder / WEIGHTS)
    names = [n for n in tensors if old in n][:count]
    save_file(
        {n.replace(old, new) if n in names else n: t for n, t in tensors.items()}, folder / WEIGHTS
    )


def test_an_adapter_of_which_no_key_matches_is_refused(adapter_folder):
    rename(adapter_folder, "base_model.model.model.", "base_model.model.transformer.")
    with pytest.raises(VlmtuneError, match=r"none of the adapter's \d+ tensors.*transformer"):
        opened(adapter_folder)


def test_an_adapter_of_which_one_key_does_not_match_is_refused(adapter_folder):
    rename(adapter_folder, "q_proj", "query", count=1)
    with pytest.raises(VlmtuneError, match=r"only \d+ of the adapter's .* match.*query"):
        opened(adapter_folder)


def test_a_missing_tensor_is_refused(adapter_folder):
    tensors = load_file(adapter_folder / WEIGHTS)
    tensors.pop(next(n for n in tensors if "lora_B" in n))
    save_file(tensors, adapter_folder / WEIGHTS)
    with pytest.raises(VlmtuneError, match="1 of the model's are not in its file.*lora_B"):
        opened(adapter_folder)


def test_a_tensor_without_a_target_is_refused(adapter_folder):
    config = json.loads((adapter_folder / "adapter_config.json").read_text())
    config["target_modules"] = [t for t in config["target_modules"] if "layers.0" not in t]
    (adapter_folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(VlmtuneError, match="2 of the adapter's .* did not arrive.*layers.0"):
        opened(adapter_folder)


def test_a_tensor_of_another_shape_is_refused(adapter_folder):
    tensors = load_file(adapter_folder / WEIGHTS)
    name = next(n for n in tensors if "lora_A" in n)
    save_file(tensors | {name: torch.zeros(4, 3)}, adapter_folder / WEIGHTS)
    with pytest.raises(VlmtuneError, match="does not fit its base model"):
        opened(adapter_folder)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / WEIGHTS).unlink(), "weights are missing"),
        (lambda f: (f / WEIGHTS).write_bytes(b"12345678broken"), "weights are damaged"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "does not name its base"),
        (lambda f: save_file({}, f / WEIGHTS), "adapter is empty"),
    ],
)
def test_a_spoilt_adapter_folder_is_refused(adapter_folder, spoil, message):
    spoil(adapter_folder)
    with pytest.raises(VlmtuneError, match=message):
        opened(adapter_folder)
