"""`vlmtune check` goes through for every recipe in `configs/` and for every method.

A hub model is stood in for by a tiny checkpoint of its architecture, data that is made by a script
by the sample task's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_check import run_check
from tests.conftest import ROOT
from tests.tiny_models import save_tiny_model
from tests.train.training import copy_sample, write_recipe
from vlmtune.models.families import family_for
from vlmtune.models.load import build_on_meta, read_config
from vlmtune.models.targets import resolve_targets

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
MODEL_TYPES = {
    "llava_1_5_7b_adalora": "llava",
    "qwen2_5_vl_3b_lora": "qwen2_5_vl",
    "qwen2_5_vl_7b_qlora": "qwen2_5_vl",
    "qwen3_vl_4b_qdora": "qwen3_vl",
    "smolvlm_256m_lora": "idefics3",
}
NF4 = {"quantization_bit": 4}
ADALORA = {"adalora": {"initial_rank": 4, "target_rank": 2, "warmup": 2, "final": 3}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "qlora": NF4,
    "8bit": {"quantization_bit": 8},
    "dora": {"use_dora": True},
    "qdora": {"use_dora": True, **NF4},
    "dora_with_dropout_and_a_saved_connector": {
        "use_dora": True,
        "dropout": 0.1,
        "modules_to_save": ["connector"],
    },
    "adalora": ADALORA,
    "adalora_nf4": ADALORA | NF4,
    "full": {"lora_target": [], "modules_to_save": ["all"]},
    "contrastive": {"objective": "contrastive", "eval": {"embedding_prompt": "In one word:"}},
    "contrastive_dora": {
        "objective": "contrastive",
        "use_dora": True,
        "eval": {"embedding_prompt": "In one word:"},
    },
}


def checked(recipe: Path, *overrides: str) -> dict[str, Any]:
    """What `--json` prints of a recipe that is ready, of ten rows of each set."""
    code, stdout, _ = run_check(
        recipe, *overrides, "--json", "--workers", 0, "--max-samples", 10, "--quiet"
    )
    found: dict[str, Any] = json.loads(stdout)
    assert code == 0, found["problems"]
    assert found["memory_bytes"] > 0 and found["trainable_parameters"] > 0
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_is_checked_to_the_end(name: str, tmp_path: Path, root: Path):
    overrides = [f"output_dir={tmp_path / 'run'}"]
    if name in MODEL_TYPES:
        overrides.append(f"model={save_tiny_model(MODEL_TYPES[name], tmp_path / 'model')}")
    if name.startswith("easy_vqa"):
        overrides += [
            "data.train=../data/sample/train.jsonl",
            "data.eval=../data/sample/eval.jsonl",
        ]
    found = checked(root / "configs" / f"{name}.yaml", *overrides)
    method = next((m for m in ("adalora", "full") if name.endswith(m)), "lora")
    assert found["method"] == method


def method_recipe(folder: Path, tiny_vlm: Path, data: Path, keys: dict[str, Any]) -> Path:
    has_adapter = keys.get("lora_target") != []
    if has_adapter and "adalora" not in keys:
        keys = {"rank": 4, **keys}
    path = write_recipe(folder, tiny_vlm=tiny_vlm, data=data, **keys)
    if not has_adapter:  # an adapter's key would have no effect
        path.write_text(path.read_text().replace("alpha: 8\n", ""))
    return path


@pytest.fixture
def data(sample_data: Path, tmp_path: Path) -> dict[bool, Path]:
    """By whether the samples are pairs for contrastive training."""
    questions = copy_sample(sample_data, tmp_path / "data", keep=10)
    captions = tmp_path / "data" / "captions.jsonl"
    lines = (sample_data / "captions_train.jsonl").read_text().splitlines()[:10]
    captions.write_text("\n".join(lines) + "\n")
    return {False: questions, True: captions}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_checked_to_the_end(method: str, tmp_path: Path, tiny_vlm: Path, data):
    keys = METHODS[method]
    recipe = method_recipe(tmp_path, tiny_vlm, data["objective" in keys], keys)
    found = checked(recipe)
    assert found["verdict"] == "ready", found["problems"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_every_precision_is_checked_to_the_end(precision, tmp_path: Path, tiny_vlm: Path, data):
    keys = {"use_dora": True, "train__precision": precision}
    recipe = method_recipe(tmp_path, tiny_vlm, data[False], keys)
    assert checked(recipe)["verdict"] == "ready"


def test_a_gpu_without_bfloat16_makes_its_use_an_error_with_its_line(
    tmp_path: Path, tiny_vlm: Path, data, monkeypatch
):
    keys = NF4 | {"train__precision": "bf16", "quantization": {"compute_dtype": "bfloat16"}}
    recipe = method_recipe(tmp_path, tiny_vlm, data[False], keys)
    monkeypatch.setattr("vlmtune.preflight.run.capability_of", lambda: (7, 5))
    code, stdout, _ = run_check(recipe, "--json", "--workers", 0)
    assert code == 1
    lines = recipe.read_text().splitlines()
    problems = json.loads(stdout)["problems"]
    at = [(p["file"], lines[p["line"] - 1].strip()) for p in problems]
    assert at == [
        (str(recipe), "precision: bf16"),
        (str(recipe), "compute_dtype: bfloat16"),
    ]
    assert "set train.precision=fp16" in problems[0]["message"]
    found = checked(recipe, "train.precision=fp16", "quantization.compute_dtype=float16")
    assert found["verdict"] == "ready"


def test_of_dora_the_magnitudes_are_counted_too(tmp_path: Path, tiny_vlm: Path, data):
    lora, dora = (
        checked(method_recipe(tmp_path, tiny_vlm, data[False], METHODS[method]))
        for method in ("lora", "dora")
    )
    model = build_on_meta(read_config(str(tiny_vlm)))
    family = family_for(model.config.model_type)
    targets = resolve_targets(model, ["q_proj", "v_proj", "vision_mlp"], family=family, rank=4)
    magnitudes = sum(target.out_features for target in targets)
    assert dora["trainable_parameters"] == lora["trainable_parameters"] + magnitudes
