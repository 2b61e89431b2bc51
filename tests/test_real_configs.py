"""The shipped recipes of real models: they load, and train as many parameters as worked by hand.

The architectures are the published `config.json`s, cut down to what decides shapes, and are built
on the meta device: every path and every size is real, no weight exists.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import AutoConfig, PreTrainedModel

from tests.tiny_models import build_tiny_model
from vlmtune.models.families import family_for
from vlmtune.models.load import build_on_meta
from vlmtune.models.quantize import expand_skip
from vlmtune.models.targets import (
    has_tied_embeddings,
    linear_modules,
    resolve_modules_to_save,
    resolve_targets,
)
from vlmtune.recipe.load import load_recipe

QWEN2_5_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
CONFIGS = {
    "qwen2_5_vl_7b_qlora": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        "vision_config": {**QWEN2_5_VISION, "out_hidden_size": 3584},
    },
    "qwen2_5_vl_3b_lora": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        "vision_config": {**QWEN2_5_VISION, "out_hidden_size": 2048},
    },
    "qwen3_vl_4b_qdora": {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
            "out_hidden_size": 2560,
        },
    },
    "smolvlm_256m_lora": {
        "model_type": "idefics3",
        "tie_word_embeddings": False,
        "scale_factor": 4,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49280,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
    },
    "llava_1_5_7b_adalora": {
        "model_type": "llava",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
    },
}
# Parameters of the published checkpoints: the shapes above are theirs.
PUBLISHED = {
    "qwen2_5_vl_7b_qlora": 8_292_166_656,
    "qwen2_5_vl_3b_lora": 3_754_622_976,
    "qwen3_vl_4b_qdora": 4_437_815_808,
    "smolvlm_256m_lora": 256_484_928,
    "llava_1_5_7b_adalora": 7_063_427_072,
}
NAMES = tuple(CONFIGS)


def lora(rank: int, in_features: int, out_features: int) -> int:
    """A is (rank, in), B is (out, rank)."""
    return rank * in_features + out_features * rank


def dora(rank: int, in_features: int, out_features: int) -> int:
    """LoRA and one magnitude per output."""
    return lora(rank, in_features, out_features) + out_features


def adalora(rank: int, in_features: int, out_features: int) -> int:
    """LoRA and the singular values E (rank, 1)."""
    return lora(rank, in_features, out_features) + rank


TRAINED = {
    # q: 3584 -> 28 heads x 128; v: 3584 -> 4 x 128; the tower's MLP: gate, up and down.
    "qwen2_5_vl_7b_qlora": 28 * (lora(16, 3584, 3584) + lora(16, 3584, 512))
    + 32 * (2 * lora(16, 1280, 3420) + lora(16, 3420, 1280)),  # 5,046,272 + 7,219,200
    # q and o: 2048 x 2048; k and v: 2048 -> 2 x 128; the MLP 2048 x 11008.
    "qwen2_5_vl_3b_lora": 36
    * (2 * lora(16, 2048, 2048) + 2 * lora(16, 2048, 256) + 3 * lora(16, 2048, 11008)),
    # q: 2560 -> 32 x 128 = 4096, o back; k and v: 2560 -> 8 x 128; MLP 9728.
    # Connector: the merger and three deepstack mergers, each 4 x 1024 -> 4096 -> 2560.
    "qwen3_vl_4b_qdora": 36
    * (
        dora(16, 2560, 4096)
        + dora(16, 4096, 2560)
        + 2 * dora(16, 2560, 1024)
        + 2 * dora(16, 2560, 9728)
        + dora(16, 9728, 2560)
    )
    + 4 * (dora(16, 4096, 4096) + dora(16, 4096, 2560)),
    # q and o: 576 x 576; k and v: 576 -> 3 x 64; MLP 1536; the tower's q, k, v, out: 768 x 768;
    # the connector in full: 768 x 4 x 4 -> 576, without bias.
    "smolvlm_256m_lora": 30
    * (2 * lora(8, 576, 576) + 2 * lora(8, 576, 192) + 3 * lora(8, 576, 1536))
    + 12 * 4 * lora(8, 768, 768)
    + 768 * 16 * 576,
    # q, k, v, o: 4096 x 4096; MLP 11008; ranks before pruning.
    "llava_1_5_7b_adalora": 32 * (4 * adalora(12, 4096, 4096) + 3 * adalora(12, 4096, 11008)),
}
NUMBERS = {  # the same, multiplied out
    "qwen2_5_vl_7b_qlora": 12_265_472,
    "qwen2_5_vl_3b_lora": 29_933_568,
    "qwen3_vl_4b_qdora": 35_112_960,
    "smolvlm_256m_lora": 10_109_952,
    "llava_1_5_7b_adalora": 29_985_408,
}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    built = {}
    for name, config in CONFIGS.items():
        values = dict(config)
        built[name] = build_on_meta(AutoConfig.for_model(values.pop("model_type"), **values))
    return built


def recipe_of(name: str, root: Path):
    return load_recipe(root / "configs" / f"{name}.yaml").recipe


@pytest.mark.parametrize("name", NAMES)
def test_the_architecture_has_the_published_number_of_parameters(name, models):
    assert sum(p.numel() for p in models[name].parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_worked_arithmetic_gives_the_stated_number(name):
    assert TRAINED[name] == NUMBERS[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_trains_the_parameters_worked_by_hand(name, models, root):
    assert trained_parameters(models[name], recipe_of(name, root)) == TRAINED[name]


def trained_parameters(model: PreTrainedModel, recipe) -> int:
    """Adapters and fully trained modules that the recipe resolves to on `model`."""
    family = family_for(model.config.model_type)
    rank = recipe.adalora.initial_rank if recipe.adalora else recipe.rank
    targets = resolve_targets(model, recipe.lora_target, family=family, rank=rank)
    total = sum(t.rank * (t.in_features + t.out_features) for t in targets)
    if recipe.use_dora:
        total += sum(target.out_features for target in targets)
    if recipe.adalora:
        total += sum(target.rank for target in targets)
    for path in resolve_modules_to_save(model, recipe.modules_to_save, family=family):
        total += sum(p.numel() for p in model.get_submodule(path).parameters())
    return total


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LoraConfig(r=4), lora),
        (LoraConfig(r=4, use_dora=True), dora),
        (AdaLoraConfig(init_r=4, target_r=2, total_step=10), adalora),
    ],
)
def test_the_formulas_count_what_peft_trains(config, count):
    model, family = build_tiny_model("qwen3_vl"), family_for("qwen3_vl")
    targets = resolve_targets(model, ["all-linear", "connector"], family=family, rank=4)
    config.target_modules = [target.path for target in targets]
    trained = get_peft_model(model, config).get_nb_trainable_parameters()[0]
    assert trained == sum(count(4, t.in_features, t.out_features) for t in targets)


def test_leaf_names_that_hit_the_tower_too_would_give_another_number(models, root):
    recipe = recipe_of("qwen2_5_vl_3b_lora", root)
    by_suffix = recipe.model_copy(
        update={"lora_target": ["language.attn", r"re:.*(gate|up|down)_proj"]}
    )
    model = models["qwen2_5_vl_3b_lora"]
    extra = 32 * 3 * lora(16, 1280, 3420)
    assert trained_parameters(model, by_suffix) == TRAINED["qwen2_5_vl_3b_lora"] + extra, (
        "as PEFT's suffix match would have it"
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_header_states_purpose_launch_command_and_computed_weights(name, models, root):
    text = (root / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ")
    assert f"# Launch: vlmtune train configs/{name}.yaml" in header
    assert any("computed, not measured" in line for line in header)
    recipe = recipe_of(name, root)
    optimizer_bytes = 10 if "8bit" in recipe.train.optimizer else 16
    weights = weight_bytes(models[name], recipe) / 2**30
    trained = TRAINED[name] * optimizer_bytes / 2**30
    assert any(f"weights {weights:.1f} + trained {trained:.2f}" in line for line in header)


def weight_bytes(model: PreTrainedModel, recipe) -> float:
    total = sum(p.numel() for p in model.parameters())
    if recipe.quantization_bit == 16:
        return 2 * total
    family = family_for(model.config.model_type)
    skip = expand_skip(model, recipe.quantization.skip, family=family)
    quantised = sum(m.weight.numel() for p, m in linear_modules(model).items() if p not in skip)
    # NF4: 4 bits, an 8-bit constant per 64 weights, a 32-bit one per 64 x 256.
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    return quantised * bits / 8 + 2 * (total - quantised)


def test_tied_heads_are_seen_on_the_meta_device(models):
    assert {name: has_tied_embeddings(model) for name, model in models.items()} == {
        "qwen2_5_vl_7b_qlora": False,
        "qwen2_5_vl_3b_lora": True,
        "qwen3_vl_4b_qdora": True,
        "smolvlm_256m_lora": False,
        "llava_1_5_7b_adalora": False,
    }


def test_the_default_skip_of_a_7b_quantises_the_language_layers_only(models):
    model = models["qwen2_5_vl_7b_qlora"]
    skip = expand_skip(
        model, ["vision", "connector", "lm_head"], family=family_for(model.config.model_type)
    )
    quantised = [path for path in linear_modules(model) if path not in skip]
    assert len(quantised) == 28 * 7
    assert all(path.startswith("model.language_model.layers.") for path in quantised)
