"""A merge tensor by tensor is the merge of the whole model, at the memory of one shard."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tests.models.adapted import (
    METHODS,
    adapted,
    logits_of,
    open_base,
    randomise,
    recipe_for,
    write_run,
)
from tests.tiny_models import MODEL_TYPES, build_tiny_processor, save_tiny_model, tiny_config
from vlmtune.errors import VlmtuneError
from vlmtune.models import merge as merging
from vlmtune.models.adapters.base import tuner_layers
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.load import pixel_budget, set_pixel_budget
from vlmtune.models.merge import fold_and_write, merge, verify_written
from vlmtune.models.merge_verify import MergeFailed, build_probes
from vlmtune.models.merge_write import Folding, open_lazily, plan_output
from vlmtune.models.open import open_target
from vlmtune.models.streamed import load_lazily, stored_tensors, streaming, weight_files


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("model"))


def trained_run(model, folder, **changes):
    return write_run(folder, adapted(model, **changes), recipe_for(model, **changes))


def tensors_of(folder):
    return {
        key: value
        for file in folder.glob("*.safetensors")
        for key, value in load_file(file).items()
    }


def whole(run, folder):
    """PEFT's own merge of the model in memory, saved by transformers."""
    model = open_target(run, dtype=torch.float32, device="cpu").vlm.model
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    merged.save_pretrained(folder)


# The same as the whole model in memory


@pytest.mark.parametrize(
    ("model_type", "method"),
    [("qwen2_5_vl", method) for method in METHODS]
    + [(name, "dora") for name in MODEL_TYPES if name != "qwen2_5_vl"],
)
def test_tensor_by_tensor_writes_what_the_whole_model_gives(tmp_path, model_type, method):
    model = save_tiny_model(model_type, tmp_path / "model")
    run = trained_run(model, tmp_path / "run", **METHODS[method])
    assert merge(run, tmp_path / "merged", dtype="float32").verified
    whole(run, tmp_path / "whole")
    merged, expected = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "whole")
    assert merged.keys() == expected.keys() == tensors_of(model).keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in merged.items())
    if method != "full":
        base = tensors_of(model)
        untouched = [key for key in merged if torch.equal(merged[key], base[key])]
        assert 0 < len(untouched) < len(merged)


def test_an_adapter_on_the_embeddings_of_other_tools_is_merged(model_folder, tmp_path):
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])
    model = get_peft_model(open_base(model_folder).model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(model_folder)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32").verified
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=1e-5, atol=1e-5)
    assert not merged.config.tie_word_embeddings


# What the checkpoint holds


def test_every_tensor_keeps_its_own_dtype_and_key_where_none_is_asked_for(model_folder, tmp_path):
    """Norms in float32 within a bfloat16 checkpoint, and a tensor that no module wants."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    tensors = {
        key: value if "norm" in key else value.bfloat16()
        for key, value in tensors_of(model).items()
    }
    tensors["extra.unused.weight"] = torch.arange(5, dtype=torch.int64)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run = trained_run(model, tmp_path / "run")
    assert merge(run, tmp_path / "merged").verified
    merged = tensors_of(tmp_path / "merged")
    assert {key: t.dtype for key, t in merged.items()} == {k: t.dtype for k, t in tensors.items()}
    changed = {key for key in tensors if not torch.equal(merged[key], tensors[key])}
    assert changed and all("q_proj" in key or "mlp" in key for key in changed)


def test_a_pair_that_the_files_hold_twice_stays_tied(model_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    tensors = tensors_of(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run = trained_run(model, tmp_path / "run", modules_to_save=["lm_head"])
    assert merge(run, tmp_path / "merged").verified
    merged = tensors_of(tmp_path / "merged")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], tensors["lm_head.weight"])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_a_pair_that_the_files_hold_with_different_values_is_not_tied(model_folder, tmp_path):
    """The config says that they are tied; transformers then believes the files."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    tensors = tensors_of(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    lazy = load_lazily(str(model), tmp_path / "converted")
    with streaming(lazy.vlm.model, lazy.weights.keys(), lazy.read):
        logits = logits_of(lazy.vlm.model)
    assert lazy.ties == () and torch.equal(logits, logits_of(open_base(model).model))
    assert not torch.equal(logits, logits_of(open_base(model_folder).model))


@pytest.mark.parametrize("max_pixels", [None, 1024])
def test_files_of_the_base_are_copied_unless_training_changed_them(
    model_folder, tmp_path, max_pixels
):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    for name in ("LICENSE", "modeling_own.py", "optimizer.pt"):
        (model / name).write_text("{}")
    processor = AutoProcessor.from_pretrained(model)
    processor.image_processor.save_pretrained(model)
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    run = trained_run(model_folder, tmp_path / "run")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(model)
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    set_pixel_budget(processor, min_pixels=None, max_pixels=max_pixels)
    processor.save_pretrained(run / "adapter")
    merge(run, tmp_path / "merged")
    merged = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    assert merged.keys() | {"optimizer.pt"} >= files.keys() - {"preprocessor_config.json"}
    assert "optimizer.pt" not in merged
    changed = {name for name in merged if merged[name] != files.get(name)}
    budget = pixel_budget(AutoProcessor.from_pretrained(tmp_path / "merged"))
    if max_pixels is None:
        assert changed == {"model.safetensors"} and "preprocessor_config.json" in merged
    else:
        assert changed == {"model.safetensors", "processor_config.json"}
        assert "preprocessor_config.json" not in merged and budget[1] == 1024
    assert {path.name: path.read_bytes() for path in model.iterdir()} == files


# A wrong checkpoint

Q0 = "model.layers.0.self_attn.q_proj.weight"
Q1 = "model.layers.1.self_attn.q_proj.weight"
LAYER = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def written(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    run = trained_run(model_folder, folder / "run", use_dora=True)
    folding = open_lazily(run, folder / "converted")
    plan = plan_output(folding, None)
    probes = build_probes(folding.vlm, None, [])
    reference = fold_and_write(folding, plan, probes, folder / "merged", shard_size="1GB")
    assert verify_written(folder / "merged", folding, plan, reference).verified
    layer = tuner_layers(folding.vlm.model)[LAYER]
    return folder / "merged", (folding, plan, reference), layer


def change_of(layer):
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return b @ a, layer.scaling["default"], layer.lora_magnitude_vector["default"].weight


def without_scale(tensors, base, written, layer):
    change, _, magnitude = change_of(layer)
    changed = base[Q0] + change
    tensors[Q0] = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)


def without_magnitude(tensors, base, written, layer):
    change, scale, _ = change_of(layer)
    tensors[Q0] = base[Q0] + scale * change


def under_another_key(tensors, base, written, layer):
    tensors[Q0], tensors[Q1] = tensors[Q1], tensors[Q0]


def in_a_row_that_no_sample_reads(tensors, base, written, layer):
    used = torch.cat([p.inputs["input_ids"].flatten() for p in written[2].probes])
    unused = next(i for i in range(300) if i not in used.tolist())
    tensors["model.embed_tokens.weight"][unused, 0] += 1e-6


def one_missing(tensors, base, written, layer):
    del tensors["visual.blocks.0.norm1.weight"]


def one_added(tensors, base, written, layer):
    tensors["model.another.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_scale, r"position .*farthest from W.*layers\.0\.self_attn\.q_proj\.weight"),
        (without_magnitude, r"position .*farthest from W.*layers\.0\.self_attn\.q_proj\.weight"),
        (under_another_key, r"position .*farthest from W.*layers\.[01]\.self_attn\.q_proj"),
        (in_a_row_that_no_sample_reads, r"1 tensor of .*farthest from W.*embed_tokens\.weight"),
        (one_missing, r"not whole: 1 tensor missing and 0 .*visual\.blocks\.0\.norm1"),
        (one_added, r"not whole: 0 tensors missing and 1 .*model\.another\.weight"),
    ],
)
def test_a_wrong_tensor_fails_and_is_named(model_folder, written, tmp_path, spoil, message):
    folder, expected, layer = written
    shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors, load_file(model_folder / "model.safetensors"), expected, layer)
    tensors = {key: t.detach().clone().contiguous() for key, t in tensors.items()}
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeFailed, match=message) as failure:
        verify_written(tmp_path / "copy", *expected)
    assert not failure.value.report.verified and failure.value.exit_code == 1


def test_a_fold_that_is_not_the_adapter_fails_before_anything_is_written(
    model_folder, tmp_path, monkeypatch
):
    run = trained_run(model_folder, tmp_path / "run")
    right = Folding.folded

    def wrong(self, name):
        return right(self, name) * (
            1.01 if name.endswith("layers.1.self_attn.q_proj.weight") else 1
        )

    monkeypatch.setattr(Folding, "folded", wrong)
    with pytest.raises(MergeFailed, match=r"before rounding.*layers\.1\.self_attn\.q_proj.*1\.00%"):
        merge(run, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_leaves_nothing(model_folder, tmp_path, monkeypatch):
    run = trained_run(model_folder, tmp_path / "run")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging, "write_merged", full)
    with pytest.raises(VlmtuneError, match="No space left on device"):
        merge(run, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# Memory


def test_one_module_at_a_time_has_its_weights(model_folder, tmp_path):
    lazy = load_lazily(str(model_folder), tmp_path / "converted")
    parameters = list(lazy.vlm.model.parameters())

    def held():
        return [p for p in parameters if p.untyped_storage().nbytes() > 4]

    seen = []

    def read(name):
        seen.append((name, len(held())))
        return lazy.read(name)

    assert held() == []
    with streaming(lazy.vlm.model, lazy.weights.keys(), read):
        logits = logits_of(lazy.vlm.model)
    torch.testing.assert_close(logits, logits_of(open_base(model_folder).model), rtol=0, atol=0)
    assert held() == []
    assert len(seen) >= 20 and all(number == 0 for _, number in seen)
    with streaming(lazy.vlm.model, lazy.weights.keys(), lazy.read, at_once=True):
        assert torch.equal(logits_of(lazy.vlm.model), logits)
    assert logits_of(lazy.vlm.model).isnan().all()  # no weight is left, and none is made up


class Reaching(nn.Module):
    """Uses its child's weight without running the child."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return x @ self.child.weight


def test_a_weight_that_was_not_read_is_nan_unless_all_are_read_at_once():
    model = Reaching()
    weight = model.child.weight.detach().clone()
    x = torch.ones(1, 3)
    with streaming(model, {"child.weight"}, lambda name: weight):
        assert model(x).isnan().all()
    with streaming(model, {"child.weight"}, lambda name: weight, at_once=True):
        assert torch.equal(model(x), x @ weight)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"no weights", "a weight file is damaged"),
        ("model.safetensors.index.json", b"{", "index.json is damaged"),
        ("model.safetensors.index.json", b"{}", "index.json is damaged: 'weight_map'"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}', "gone"),
        ("pytorch_model.bin", b"", "needs model.safetensors, or the shards"),
    ],
)
def test_weights_that_cannot_be_read_are_the_users_to_mend(tmp_path, name, content, message):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VlmtuneError, match=message):
        stored_tensors(weight_files(str(tmp_path)))


def test_a_model_that_lacks_a_weight_is_refused(model_folder, tmp_path):
    model = shutil.copytree(model_folder, tmp_path / "model")
    tensors = tensors_of(model)
    del tensors[Q0]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VlmtuneError, match=r"1 weight of .* missing.*layers\.0.*q_proj"):
        load_lazily(str(model), tmp_path / "converted")


# Weights that transformers makes out of others


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("saved", [[], ["model.language_model.layers.1.mlp.experts"]])
def test_a_model_whose_weights_are_converted_is_merged_like_any_other(tmp_path, saved, dtype):
    """The experts of this architecture are transposed when they are loaded."""
    model = experts_model(tmp_path / "model")
    parts = {
        "vision": ["model.visual"],
        "connector": ["model.visual.merger"],
        "language": ["model.language_model"],
        "lm_head": ["lm_head"],
    }
    recipe = recipe_for(model, lora_target=["q_proj"], modules_to_save=saved, parts=parts)
    adapter = build_adapter(open_base(model, parts=parts), recipe, total_steps=4)
    randomise(adapter.model)
    run = write_run(tmp_path / "run", adapter, recipe)
    assert merge(run, tmp_path / "merged", dtype=dtype, shard_size="100KB").verified
    model_dtype = torch.float32 if dtype == "auto" else torch.bfloat16
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert merged.dtype == model_dtype
    limit = 1e-5 if dtype == "auto" else 0.1
    assert (logits_of(merged.float()) - logits_of(adapter.model)).abs().max() < limit
    before, after = tensors_of(model), tensors_of(tmp_path / "merged")
    assert {k: (t.shape, model_dtype) for k, t in before.items()} == {
        k: (t.shape, t.dtype) for k, t in after.items()
    }
    changed = {key for key in before if not torch.equal(before[key].to(model_dtype), after[key])}
    experts = {key for key in before if ".experts." in key and ".layers.1." in key}
    assert changed >= experts if saved else not changed & experts
    assert all("q_proj" in key for key in changed - experts)


def experts_model(folder):
    processor = build_tiny_processor("qwen3_vl")
    dense = tiny_config("qwen3_vl", processor=processor).to_dict()
    text = {k: v for k, v in dense["text_config"].items() if k != "model_type"}
    vision = {k: v for k, v in dense["vision_config"].items() if k != "model_type"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = AutoConfig.for_model(
        "qwen3_vl_moe",
        text_config=text | experts,
        vision_config=vision,
        **{key: value for key, value in dense.items() if key.endswith("_token_id")},
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
