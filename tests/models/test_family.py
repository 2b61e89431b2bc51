"""Families: every module of the real architectures belongs to the part that it should."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from tests.tiny_models import MODEL_TYPES, build_tiny_model, build_tiny_processor, tiny_config
from vlmtune.errors import VlmtuneError
from vlmtune.models.families import FAMILIES, family_for, kind_of, part_of, top_level_modules
from vlmtune.models.load import build_on_meta, pixel_budget


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_parameter_belongs_to_a_part(model_type):
    model, family = build_on_meta(tiny_config(model_type, tied=False)), family_for(model_type)
    parts = {path: part_of(path, family) for path, _ in model.named_parameters()}
    assert None not in parts.values(), [path for path, part in parts.items() if part is None]
    assert set(parts.values()) == {"vision", "connector", "language", "lm_head"}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_linear_layers_of_the_tower_and_the_language_model_are_attention_or_mlp(model_type):
    model, family = build_on_meta(tiny_config(model_type)), family_for(model_type)
    counts: dict[tuple[str | None, str], int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            key = (part_of(path, family), kind_of(path, family))
            counts[key] = counts.get(key, 0) + 1
    assert {kind for part, kind in counts if part in ("vision", "language")} == {"attn", "mlp"}
    assert counts["language", "attn"] == 2 * 4  # 2 layers with q, k, v and o
    assert counts["language", "mlp"] == 2 * 3  # gate, up and down


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_stated_leaf_names_are_the_ones_found_on_the_model(model_type):
    """The generic search that an unknown model gets agrees with the family files."""
    model, stated = build_on_meta(tiny_config(model_type)), family_for(model_type)
    model_type_nobody_knows = "nobody"
    found = family_for(model_type_nobody_knows, parts=stated.parts, model=model)
    for kind in ("attention", "mlp"):
        for part in ("vision", "language"):
            assert set(getattr(found, kind)[part]) == set(getattr(stated, kind)[part])


def test_deepstack_mergers_are_part_of_the_connector():
    family = family_for("qwen3_vl")
    assert part_of("model.visual.deepstack_merger_list.0.linear_fc1", family) == "connector"
    assert part_of("model.visual.merger.linear_fc1", family) == "connector"
    assert part_of("model.visual.blocks.0.mlp.linear_fc1", family) == "vision"


def test_the_longest_matching_path_wins_and_names_match_whole_components():
    family = family_for("qwen2_5_vl")
    assert part_of("model.visual.merger", family) == "connector"
    assert part_of("model.visual.merger_norm", family) == "vision"  # not under model.visual.merger
    assert part_of("model.visuals", family) is None


def test_every_registered_model_type_is_listed_by_its_family():
    for model_type, family in FAMILIES.items():
        assert model_type in family.model_types
        AutoConfig.for_model(model_type)  # transformers knows it


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_family_has_a_pixel_budget_exactly_where_its_processor_has(model_type):
    processor = build_tiny_processor(model_type)
    assert (pixel_budget(processor) is not None) == FAMILIES[model_type].pixel_budget


class Attention(nn.Module):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        setattr(self, f"{prefix}query", nn.Linear(8, 8))
        self.dense = nn.Linear(8, 8)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 8)


class Unknown(nn.Module):
    """A VLM of a family that no file knows; `dense` is a leaf of attention and of the MLP."""

    def __init__(self) -> None:
        super().__init__()
        for part in ("eyes", "brain"):
            block = nn.Module()
            block.self_attention = Attention(part)
            block.feed_forward = FeedForward()
            self.add_module(part, nn.ModuleList([block]))
        self.bridge = nn.Linear(8, 8)


PARTS = {"vision": ["eyes"], "connector": ["bridge"], "language": ["brain"]}


def test_an_unknown_model_works_through_the_recipes_parts():
    family = family_for("nobody", parts=PARTS, model=Unknown())
    assert part_of("eyes.0.feed_forward.wide", family) == "vision"
    assert family.attention["vision"] == ("dense", "eyesquery")
    assert family.attention["language"] == ("brainquery", "dense")
    assert kind_of("brain.0.self_attention.dense", family) == "attn"
    assert kind_of("brain.0.feed_forward.dense", family) == "mlp"
    assert kind_of("bridge", family) == "connector"


def test_an_unknown_model_without_parts_is_an_error_that_lists_its_modules():
    with pytest.raises(VlmtuneError, match="nobody") as error:
        family_for("nobody", model=build_tiny_model("llava"))
    text = str(error.value)
    for path in ("model.vision_tower", "model.multi_modal_projector", "lm_head (Linear)"):
        assert path in text
    assert "model.vision_tower.embeddings" not in text  # depth 2 is enough
    assert "parts:" in text


def test_an_unknown_model_type_near_a_known_one_names_it():
    with pytest.raises(VlmtuneError, match="nearest: qwen2_5_vl"):
        family_for("qwen2_5_vll", model=Unknown())


def test_a_path_in_parts_that_no_module_has_is_an_error_with_the_nearest():
    with pytest.raises(VlmtuneError, match=r"parts\.vision: no module has the path 'eye'") as error:
        family_for("nobody", parts={**PARTS, "vision": ["eye"]}, model=Unknown())
    assert error.value.expected == "eyes"


def test_parts_without_a_language_part_are_an_error():
    with pytest.raises(VlmtuneError, match=r"does not name the language model"):
        family_for("nobody", parts={"vision": ["eyes"]}, model=Unknown())


def test_parts_override_a_known_family_part_by_part():
    model = build_tiny_model("llava")
    parts = {"connector": ["model.multi_modal_projector.linear_1"]}
    family = family_for("llava", parts=parts, model=model)
    assert part_of("model.multi_modal_projector.linear_1", family) == "connector"
    assert part_of("model.multi_modal_projector.linear_2", family) is None
    assert part_of("model.vision_tower.encoder", family) == "vision"


def test_top_level_modules_go_down_two_levels():
    model = nn.Module()
    model.a = nn.Module()
    model.a.b = nn.Sequential(nn.Linear(2, 2))
    assert top_level_modules(model) == ["a (Module)", "a.b (Sequential)"]


def test_tiny_models_are_the_same_for_the_same_seed_and_leave_the_global_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = build_tiny_model("qwen2_5_vl"), build_tiny_model("qwen2_5_vl")
    other = build_tiny_model("qwen2_5_vl", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
