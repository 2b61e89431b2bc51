"""Targets: what each kind of entry selects, and what an entry without effect says."""

from __future__ import annotations

import logging

import bitsandbytes as bnb
import pytest
from torch import nn

from tests.tiny_models import build_tiny_model, tiny_config
from vlmtune.errors import VlmtuneError
from vlmtune.models.families import family_for
from vlmtune.models.load import build_on_meta
from vlmtune.models.targets import (
    has_tied_embeddings,
    part_modules,
    resolve_modules_to_save,
    resolve_targets,
)

FAMILY = family_for("qwen2_5_vl")
LANGUAGE = "model.language_model.layers."
VISION = "model.visual.blocks."


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_on_meta(tiny_config("qwen2_5_vl", tied=True))


@pytest.fixture(scope="module")
def untied() -> nn.Module:
    return build_on_meta(tiny_config("qwen2_5_vl", tied=False))


def paths(model: nn.Module, *names: str) -> list[str]:
    return [t.path for t in resolve_targets(model, names, family=FAMILY, rank=4)]


def test_the_recipes_example_selects_language_q_and_v_and_the_towers_mlp(model):
    assert paths(model, "q_proj", "v_proj", "vision_mlp") == [
        *(
            f"{VISION}{n}.mlp.{leaf}"
            for n in (0, 1)
            for leaf in ("gate_proj", "up_proj", "down_proj")
        ),
        *(f"{LANGUAGE}{n}.self_attn.{leaf}" for n in (0, 1) for leaf in ("q_proj", "v_proj")),
    ]


def test_a_leaf_name_means_the_language_part_though_the_tower_shares_it(model):
    suffix_match = [p for p, _ in model.named_modules() if p.endswith("gate_proj")]
    assert paths(model, "gate_proj") == [f"{LANGUAGE}{n}.mlp.gate_proj" for n in (0, 1)]
    assert paths(model, "gate_proj") != suffix_match  # PEFT's own reading takes the tower too


@pytest.mark.parametrize(
    ("group", "count"),
    [
        ("language.attn", 2 * 4),
        ("language.mlp", 2 * 3),
        ("vision.attn", 2 * 2),
        ("vision.mlp", 2 * 3),
        ("connector", 2),
        ("all-linear", 2 * 7),
    ],
)
def test_groups_select_their_layers(model, group, count):
    assert len(paths(model, group)) == count


def test_vision_mlp_is_an_alias(model):
    assert paths(model, "vision_mlp") == paths(model, "vision.mlp")


def test_all_linear_leaves_out_the_tower_the_connector_and_the_head(untied):
    assert all(path.startswith(LANGUAGE) for path in paths(untied, "all-linear"))


def test_full_paths_patterns_and_modules_select_what_they_name(model):
    q = f"{LANGUAGE}1.self_attn.q_proj"
    assert paths(model, q) == [q]
    assert paths(model, r"re:.*layers\.1\..*q_proj") == [q]
    assert len(paths(model, f"{LANGUAGE}1")) == 7  # a module: every linear layer in it


def test_patterns_match_whole_paths(model):
    with pytest.raises(VlmtuneError, match="matches no linear layer"):
        paths(model, r"re:layers\.1\..*q_proj")


def test_overlapping_entries_count_a_layer_once(model):
    assert paths(model, "q_proj", "language.attn", r"re:.*q_proj") == paths(model, "language.attn")


def test_a_convolution_is_no_target(model):
    with pytest.raises(VlmtuneError, match=r"patch_embed\.proj' is a Conv3d"):
        paths(model, "model.visual.patch_embed.proj")
    with pytest.raises(VlmtuneError, match=r"matches model\.visual\.patch_embed\.proj, a Conv3d"):
        paths(model, r"re:model\.visual\..*proj")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("qproj", "did you mean 'q_proj'"),
        ("vision.ml", "did you mean 'vision.mlp'"),
        (f"{LANGUAGE}7.self_attn.q_proj", r"did you mean 'model\.language_model\.layers\.\d"),
        ("qkv", r"this one is in vision: .*re:\.\*"),
        ("zzz", r"a leaf name of the language part \(down_proj, gate_proj, k_proj"),
        ("re:(", "is not a regular expression"),
    ],
)
def test_an_entry_that_matches_nothing_is_an_error_with_what_is_near(model, name, says):
    with pytest.raises(VlmtuneError, match=says):
        paths(model, "q_proj", name)


def test_rank_is_lowered_to_the_layers_limit_with_one_counted_notice(model, caplog):
    with caplog.at_level(logging.WARNING, "vlmtune"):
        targets = resolve_targets(model, ["q_proj", "v_proj"], family=FAMILY, rank=48)
    # v: 64 -> 2 heads x 16 = 32
    assert {t.leaf: t.rank for t in targets} == {"q_proj": 48, "v_proj": 32}
    assert len(caplog.records) == 1
    assert "rank 48 is more than 2 of 4" in caplog.records[0].getMessage()


def test_no_notice_where_the_rank_fits(model, caplog):
    with caplog.at_level(logging.WARNING, "vlmtune"):
        resolve_targets(model, ["v_proj"], family=FAMILY, rank=32)
    assert not caplog.records


def test_a_target_has_the_sizes_of_its_layer(model):
    targets = resolve_targets(model, ["q_proj", "v_proj", "connector"], family=FAMILY, rank=4)

    def sizes(part):
        return [(t.in_features, t.out_features) for t in targets if t.part == part]

    assert sizes("language") == [(64, 64), (64, 32)] * 2
    assert sizes("connector") == [(256, 256), (256, 64)]  # the merger: 4 patches of 64


def test_quantised_layers_are_linear_layers():
    model = build_on_meta(tiny_config("qwen2_5_vl"))
    for kind, n in ((bnb.nn.Linear4bit, 0), (bnb.nn.Linear8bitLt, 1)):
        model.set_submodule(f"{LANGUAGE}{n}.self_attn.q_proj", kind(64, 64))
    targets = resolve_targets(model, ["q_proj"], family=FAMILY, rank=4)
    assert [(t.in_features, t.out_features) for t in targets] == [(64, 64)] * 2


def test_a_tied_head_is_no_target_and_an_untied_one_is(model, untied):
    with pytest.raises(VlmtuneError, match="shares its weight with the embeddings"):
        paths(model, "lm_head")
    assert paths(untied, "lm_head") == ["lm_head"]


def test_ties_are_seen_on_the_meta_device_and_on_the_real_one(model, untied):
    assert has_tied_embeddings(model)
    assert not has_tied_embeddings(untied)
    assert has_tied_embeddings(build_tiny_model("llava", tied=True))
    assert not has_tied_embeddings(build_tiny_model("llava", tied=False))


EMBEDDINGS = "model.language_model.embed_tokens"


def test_embeddings_and_head_of_a_tied_model_are_one_module_to_save(model, untied):
    for names in (["embeddings"], ["lm_head"], ["embeddings", "lm_head"], [EMBEDDINGS, "lm_head"]):
        assert resolve_modules_to_save(model, names, family=FAMILY) == [EMBEDDINGS]
    assert resolve_modules_to_save(untied, ["embeddings", "lm_head"], family=FAMILY) == [
        EMBEDDINGS,
        "lm_head",
    ]


def test_modules_to_save_take_parts_and_full_paths_each_once(model):
    path = f"{LANGUAGE}0.mlp"
    inside = f"{path}.gate_proj"
    names = ["connector", inside, path, "model.visual.merger"]
    assert resolve_modules_to_save(model, names, family=FAMILY) == ["model.visual.merger", path]


def test_the_vision_part_is_given_without_the_connector_inside_it(model):
    saved = resolve_modules_to_save(model, ["vision"], family=FAMILY)
    assert saved == ["model.visual.patch_embed", f"{VISION}0", f"{VISION}1"]


def test_lists_of_modules_are_given_by_their_items():
    """PEFT refuses to wrap a ModuleList."""
    model, family = build_on_meta(tiny_config("qwen3_vl")), family_for("qwen3_vl")
    merger = "model.visual.deepstack_merger_list"
    assert part_modules(model, "connector", family=family) == ["model.visual.merger", f"{merger}.0"]
    assert resolve_modules_to_save(model, [merger], family=family) == [f"{merger}.0"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3_vl", "llava", "smolvlm"])
def test_all_covers_every_parameter(model_type, tied):
    model, family = build_on_meta(tiny_config(model_type, tied=tied)), family_for(model_type)
    saved = resolve_modules_to_save(model, ["all"], family=family)
    covered = {id(p) for path in saved for p in model.get_submodule(path).parameters()}
    assert covered == {id(p) for p in model.parameters()}


def test_a_module_to_save_that_does_not_exist_is_an_error_with_the_nearest(model):
    with pytest.raises(VlmtuneError, match=r"'embedings' matches no module.*'embeddings'"):
        resolve_modules_to_save(model, ["embedings"], family=FAMILY)
