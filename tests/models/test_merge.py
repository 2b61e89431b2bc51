"""Merged = base + adapter for every method, and a merge that is not must fail."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.models.adapted import (
    METHODS,
    adapted,
    logits_of,
    open_base,
    picture_inputs,
    recipe_for,
    text_inputs,
    write_run,
)
from tests.tiny_models import save_tiny_model
from vlmtune.errors import VlmtuneError
from vlmtune.models import merge as merging
from vlmtune.models.merge import fold_and_write, merge, verify_written
from vlmtune.models.merge_verify import MergeFailed, build_probes
from vlmtune.models.merge_write import open_lazily, plan_output
from vlmtune.models.open import open_target

RANK_0 = {"adalora": {"initial_rank": 6, "target_rank": 1, "warmup": 1, "final": 1, "interval": 1}}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("model"))


def trained_run(model_folder, folder, **changes):
    adapter = adapted(model_folder, **changes)
    return write_run(folder, adapter, recipe_for(model_folder, **changes)), adapter


def run_with_rank_0(model_folder, folder):
    """Three steps on text: the vision modules are pruned away."""
    adapter = adapted(model_folder, **RANK_0)
    for step in (1, 2, 3):
        adapter.model(**text_inputs(), use_cache=False).logits.logsumexp(-1).mean().backward()
        adapter.after_step(step)
        adapter.model.zero_grad()
    assert 0 in adapter.allocator.ranks().values()
    return write_run(folder, adapter, recipe_for(model_folder, **RANK_0)), adapter


def stock_logits(folder, inputs=None):
    return logits_of(
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32), inputs
    )


@pytest.mark.parametrize("method", [*METHODS, "rank_0"])
def test_the_merged_model_is_base_plus_adapter(model_folder, tmp_path, method):
    if method == "rank_0":
        run, adapter = run_with_rank_0(model_folder, tmp_path / "run")
    else:
        run, adapter = trained_run(model_folder, tmp_path / "run", **METHODS[method])
    report = merge(run, tmp_path / "merged", dtype="float32")
    assert report.verified and report.max_difference <= report.tolerance
    assert report.output == str(tmp_path / "merged")
    for inputs in (text_inputs(), picture_inputs(open_base(model_folder))):
        expected = logits_of(adapter.model, inputs)
        merged = stock_logits(tmp_path / "merged", inputs)
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
        base = logits_of(open_base(model_folder).model, inputs)
        assert (base - expected).abs().max() > 1e-3  # the adapter dropped
    AutoProcessor.from_pretrained(tmp_path / "merged")
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "modules_to_save", "tied_head"])
def test_the_closed_formulas_agree_with_pefts_merge(model_folder, tmp_path, method):
    run, _ = trained_run(model_folder, tmp_path / "run", **METHODS[method])
    merged = open_target(run, dtype=torch.float32, device="cpu").vlm.model.merge_and_unload()
    after = dict(merged.named_parameters(remove_duplicate=False))
    before = dict(open_base(model_folder).model.named_parameters())
    folding = open_lazily(run, tmp_path / "converted")
    for name in folding.changed:
        torch.testing.assert_close(folding.expected(name), after[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(folding.folded(name), after[name])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == folding.changed & before.keys()


def test_another_architecture_merges_in_shards_with_its_own_dtype(tmp_path):
    model = save_tiny_model("llava", tmp_path / "model", tied=False)
    run, _ = trained_run(model, tmp_path / "run", use_dora=True, modules_to_save=["connector"])
    report = merge(run, tmp_path / "merged", dtype="bfloat16", shard_size="100KB")
    assert report.verified and 0 < report.rounding <= report.tolerance < report.adapter_effect
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    names = {p.name for p in (tmp_path / "merged").iterdir()}
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == torch.bfloat16


def test_a_tied_head_stays_tied_in_the_merged_model(model_folder, tmp_path):
    run, adapter = trained_run(model_folder, tmp_path / "run", modules_to_save=["lm_head"])
    merge(run, tmp_path / "merged", dtype="float32")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    trained = adapter.model.get_base_model().lm_head.weight
    assert torch.equal(model.lm_head.weight, trained)


def test_an_adapter_on_one_end_of_a_tied_pair_unties_it(model_folder, tmp_path):
    """Such adapters come from other tools; our own recipe refuses the target."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        open_base(model_folder).model, LoraConfig(r=4, target_modules=["lm_head"])
    )
    with torch.no_grad():
        model.base_model.model.lm_head.lora_B["default"].weight.normal_()
    model.peft_config["default"].base_model_name_or_path = str(model_folder)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32").verified
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    torch.testing.assert_close(
        stock_logits(tmp_path / "merged"), logits_of(model), rtol=1e-5, atol=1e-5
    )


# A wrong checkpoint


@pytest.fixture(scope="module")
def written(model_folder, tmp_path_factory):
    """A merged folder and what it was verified against."""
    folder = tmp_path_factory.mktemp("written")
    run, _ = trained_run(model_folder, folder / "run")
    folding = open_lazily(run, folder / "converted")
    plan = plan_output(folding, torch.bfloat16)
    probes = build_probes(folding.vlm, None, [])
    reference = fold_and_write(folding, plan, probes, folder / "merged", shard_size="1GB")
    expected = (folding, plan, reference)
    assert verify_written(folder / "merged", *expected).verified
    return folder / "merged", expected


@pytest.mark.parametrize("wrong", ["dropped", "scaling off", "one weight off"])
def test_a_wrong_checkpoint_fails_and_names_the_module(model_folder, written, tmp_path, wrong):
    folder, expected = written
    merged = load_file(folder / "model.safetensors")
    base = load_file(model_folder / "model.safetensors")
    wrongly = {"dropped": 0.0, "scaling off": 0.5}.get(wrong, 1.0)
    tensors = {
        n: (base[n] + wrongly * (t.float() - base[n])).to(t.dtype).contiguous()
        for n, t in merged.items()
    }
    if wrong == "one weight off":
        name = next(n for n in tensors if n.endswith("layers.1.self_attn.q_proj.weight"))
        tensors[name] = tensors[name] * 1.5
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeFailed, match="position .*farthest from W") as failure:
        verify_written(tmp_path, *expected)
    if wrong == "one weight off":
        assert re.search(r"layers\.1\.self_attn\.q_proj\.weight, by (50|49.99)", str(failure.value))
    report = failure.value.report
    assert not report.verified and report.max_difference > report.tolerance
    assert failure.value.exit_code == 1


def test_an_adapter_lost_by_rounding_fails_with_advice(tiny_vlm, tmp_path):
    """A change far below bfloat16's steps is gone after rounding, and float32 keeps it."""
    targets = {"lora_target": ["q_proj", "v_proj"]}
    run = write_run(
        tmp_path / "run", adapted(tiny_vlm, size=1e-4, **targets), recipe_for(tiny_vlm, **targets)
    )
    with pytest.raises(MergeFailed, match="rounding to bfloat16 loses the adapter.*float32"):
        merge(run, tmp_path / "merged", dtype="bfloat16")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".writing*"))
    assert merge(run, tmp_path / "merged", dtype="float32").verified


# The output and the samples


def test_an_occupied_output_is_left_alone(model_folder, tmp_path):
    run, _ = trained_run(model_folder, tmp_path / "run")
    (tmp_path / "merged").mkdir()
    merge(run, tmp_path / "merged")  # an empty folder is no obstacle
    with pytest.raises(VlmtuneError, match="not empty"):
        merge(run, tmp_path / "merged")
    (tmp_path / "file").write_text("")
    with pytest.raises(VlmtuneError, match="is a file"):
        merge(run, tmp_path / "file")


def test_a_model_without_an_adapter_is_nothing_to_merge(model_folder, tmp_path):
    with pytest.raises(VlmtuneError, match="nothing to merge"):
        merge(model_folder, tmp_path / "merged")


def test_too_little_disk_space_is_seen_before_the_work(tmp_path):
    merging.check_space(10**6, tmp_path / "merged")
    with pytest.raises(VlmtuneError, match="not enough disk space.*GB free"):
        merging.check_space(2**60, tmp_path / "merged")


def test_samples_come_from_the_data_given_then_from_the_run(model_folder, tmp_path, caplog):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"id": f"s{i}", **row}) + "\n" for i in range(9)))
    vlm = open_base(model_folder)
    recipe = recipe_for(model_folder, data={"train": "gone.jsonl", "eval": str(data)})
    assert [p.id for p in build_probes(vlm, None, [data])] == ["s0", "s1", "s2", "s3"]
    assert [p.id for p in build_probes(vlm, recipe, [])] == ["s0", "s1", "s2", "s3"]
    data.unlink()
    with caplog.at_level(logging.INFO, logger="vlmtune"):
        made = build_probes(vlm, recipe, [])
    assert [p.id for p in made] == ["made:text", "made:picture"]
    assert "pixel_values" in made[1].inputs
    assert "give --data" in caplog.text
    with pytest.raises(VlmtuneError):
        build_probes(vlm, recipe, [data])
