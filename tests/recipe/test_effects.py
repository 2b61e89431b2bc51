"""Keys without effect: an error in a file, named and left out where an override makes them so."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmtune.errors import ErrorGroup
from vlmtune.recipe.data_section import Name, Not
from vlmtune.recipe.explain import walk_keys
from vlmtune.recipe.load import dump_recipe, load_recipe, load_resolved, recipe_json_schema
from vlmtune.recipe.rules import effects, values_in_effect

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"

QUICKSTART_OVERRIDES = {  # overrides -> what the one line names after `without effect: `
    "quantization_bit=16": "quantization.compute_dtype (quantization_bit is 16)",
    "quantization_bit=8": "quantization.compute_dtype (quantization_bit is 8)",
    "adalora.initial_rank=8 adalora.target_rank=4": "rank (adalora is given)",
    "train.epochs=1": "train.max_steps (train.epochs is 1)",
    "lora_target=[] modules_to_save=[all] quantization_bit=16": (
        "quantization.compute_dtype (quantization_bit is 16); rank, alpha (lora_target is [])"
    ),
    "modules_to_save=all": (
        "quantization_bit, lora_target (modules_to_save is all); "
        "quantization.compute_dtype (quantization_bit is 16); rank, alpha (lora_target is [])"
    ),
    "lora_target=[] modules_to_save=connector quantization_bit=16": (
        "quantization.compute_dtype (quantization_bit is 16); rank, alpha (lora_target is [])"
    ),
    "use_dora=true": None,
    "data.eval=null": "train.eval_every (data.eval is not given)",
    "data.eval=null eval.guard.data=../data/sample/eval.jsonl": None,
    "eval.task=retrieval": "eval.max_new_tokens (eval.task is retrieval)",
    "lora_target=all-linear": None,
}


def log_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "vlmtune"]


@pytest.mark.parametrize("overrides", QUICKSTART_OVERRIDES)
def test_an_override_wins_over_the_quickstart(
    overrides: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vlmtune")
    recipe = load_recipe(QUICKSTART, overrides.split()).recipe
    named = QUICKSTART_OVERRIDES[overrides]
    line = [] if named is None else [f"keys of quickstart.yaml without effect: {named}"]
    assert log_of(caplog) == line
    resolved = tmp_path / "recipe.resolved.yaml"
    resolved.write_text(dump_recipe(recipe))
    caplog.clear()
    assert load_recipe(resolved).recipe == load_resolved(resolved) == recipe
    assert log_of(caplog) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text("{}\n")
    return tmp_path


def write(folder: Path, values: dict[str, Any]) -> Path:
    recipe: dict[str, Any] = {"model": "org/vlm", "output_dir": "runs/x"}
    recipe["data"] = {"train": "data.jsonl"}
    for key, value in values.items():
        holder = recipe
        *above, last = key.split(".")
        for name in above:
            holder = holder.setdefault(name, {})
        holder[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


VALUES: dict[str, tuple[Any, ...]] = {
    "adalora": ({"initial_rank": 8, "target_rank": 4}, None),
    "adalora.initial_rank": (8,),
    "contrastive": ({"initial_temperature": 0.1},),
    "data.allow_urls": (True, False),
    "data.eval": ("data.jsonl", None),
    "data.on_bad_sample": ("skip", "error"),
    "data.streaming": (True, False),
    "eval.best_metric": ("loss", None),
    "eval.decoding": ({"stop": ["x"]},),
    "eval.decoding.method": ("sample", "beam", "greedy"),
    "eval.guard": ({"data": "data.jsonl"}, None),
    "eval.guard.task": ("vqa", "retrieval"),
    "eval.max_samples": (3,),
    "eval.metrics": ([], ["choice_likelihood"]),
    "eval.patience": (2,),
    "eval.scorer": ("likelihood", "embedding"),
    "eval.task": ("choice", "retrieval"),
    "lora_target": (["q_proj"], []),
    "modules_to_save": (["connector"], ["all"]),
    "objective": ("next_token", "contrastive"),
    "quantization_bit": (4, 16, 8),
    "train.epochs": (2, None),
    "train.max_steps": (5, None),
    "train.vision_cache": ("memory", "off"),
    "use_dora": (True, False),
}
"""Some values of the keys that others need, and of those without a default to write."""


def short(part: object) -> str:
    return str(part)[:40]


def holds(value: Any, needed: Any) -> bool:
    if isinstance(needed, Not):
        return needed.holds(value)
    return value in needed if isinstance(needed, tuple) else value == needed


def some_value(key: str) -> Any:
    default = dict(walk_keys())[key].default
    return VALUES[key][0] if key in VALUES else not default if default is True else default


NEEDS = [
    (key, alternative, cause)
    for key, effect in effects().items()
    for alternative in ([effect.needs] if isinstance(effect.needs, dict) else effect.needs)
    for cause in alternative
    if cause != key and "eval.guard" not in alternative and "eval.guard.task" not in alternative
]
"""Each key, each condition under which it has an effect, and each key of that condition."""


@pytest.mark.parametrize(("key", "condition", "cause"), NEEDS, ids=short)
def test_an_override_that_breaks_a_need_leaves_the_key_out_by_name(
    key: str,
    condition: dict[str, Any],
    cause: str,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="vlmtune")
    defaults = dict(walk_keys())
    given: dict[str, Any] = {"lora_target": ["q_proj"], "modules_to_save": ["connector"]}
    if key == "data.shuffle_buffer":
        given["train.max_steps"] = 5
    if key == "eval.patience":
        given["data.eval"] = "data.jsonl"
    for other, needed in condition.items():
        if other in given and holds(given[other], needed):
            continue
        given[other] = next(value for value in VALUES[other] if holds(value, needed))
        if given[other] is None or given[other] == defaults[other].default:
            del given[other]  # as it is where nothing is written
    given[key] = some_value(key)
    if key == "modules_to_save":
        given = {"lora_target": [], "modules_to_save": ["all"]}
    recipe = write(folder, given)
    load_recipe(recipe)
    assert log_of(caplog) == []  # the wrong variant: nothing is named where all needs are met

    breaking = [value for value in VALUES[cause] if not holds(value, condition[cause])]
    for value in breaking:
        extra = ["train.batch_size=2"] if value == "contrastive" else []
        extra += ["train.max_steps=3"] if (key, cause) == ("train.epochs", "data.streaming") else []
        loaded = load_recipe(recipe, [f"{cause}={json.dumps(value)}", *extra])
        [line] = log_of(caplog)
        assert re.search(rf"\b{re.escape(key)}\b", line), line
        resolved = folder / "resolved.yaml"
        resolved.write_text(dump_recipe(loaded.recipe))
        caplog.clear()
        assert load_recipe(resolved).recipe == loaded.recipe


CONFLICTS = [  # what an override does not settle: lines of the file, overrides, the error
    ({"quantization": {"skip": "lm_head"}}, ["rank=4"], "quantization.skip has no effect"),
    ({"quantization_bit": 8, "quantization.double_quant": True}, ["seed=1"], "double_quant has no"),
    ({"adalora": {}, "rank": 8}, ["adalora.target_rank=4"], "rank has no effect"),
    ({"adalora": {}}, ["rank=8"], "override 'rank=8': rank has no effect because adalora is given"),
    (
        {"quantization_bit": 8},
        ["quantization.compute_dtype=float32"],
        "override 'quantization.comp",
    ),
    (
        {"quantization_bit": 4, "quantization": {"skip": []}},
        ["quantization_bit=16", "quantization.compute_dtype=float32"],
        "override 'quantization.compute_dtype=float32': quantization.compute_dtype has no effect",
    ),
    ({}, ["train.epochs=1", "train.max_steps=5"], "exclude each other"),
    ({}, ["use_dora=true", "adalora.initial_rank=9"], "exclude each other"),
    ({"lora_target": [], "modules_to_save": "all"}, ["quantization_bit=4"], "do: set 16"),
    ({"train.max_steps": 5, "data.streaming": True}, ["train.epochs=1"], "set train.max_steps"),
    ({"eval.task": "caption"}, ["eval.scorer=embedding"], "because eval.task is caption"),
]


@pytest.mark.parametrize(("values", "overrides", "says"), CONFLICTS, ids=short)
def test_what_conflicts_in_the_file_or_among_overrides_stays_an_error(
    values: dict[str, Any], overrides: list[str], says: str, folder: Path
) -> None:
    with pytest.raises(ErrorGroup) as raised:
        load_recipe(write(folder, values), overrides)
    assert says in str(raised.value)


SETTLED = [  # lines of the file, overrides, and what the line names
    (
        {"adalora": {"initial_rank": 8}},
        ["use_dora=true"],
        "adalora.initial_rank (use_dora is true)",
    ),
    ({"adalora": {}, "alpha": 8}, ["use_dora=true"], "adalora (use_dora is true)"),
    ({"use_dora": True, "rank": 8}, ["adalora={}"], "use_dora, rank (adalora is given)"),
    ({"adalora": {}}, ["objective=contrastive"], "adalora (objective is contrastive)"),
    ({"train.epochs": 2}, ["train.max_steps=5"], "train.epochs (train.max_steps is 5)"),
    (
        {"lora_target": [], "modules_to_save": "all"},
        ["lora_target=q_proj"],
        "modules_to_save (lora_target is q_proj)",
    ),
    (
        {"data.eval": "data.jsonl", "eval.best_metric": "loss", "eval.patience": 2},
        ["data.eval=null"],
        "eval.best_metric (data.eval is not given); eval.patience (eval.best_metric is not given)",
    ),
    (
        {"eval.metrics": ["exact_match"], "eval.best_metric": "loss", "data.eval": "data.jsonl"},
        ["eval.task=caption"],
        "eval.metrics (eval.task is caption)",
    ),
    ({"revision": "v1"}, ["model=org/other"], "revision (model is org/other)"),
    ({"modules_to_save": "all"}, ["seed=1"], None),
    ({"revision": "v1"}, ["model=org/vlm"], None),
    ({"eval.metrics": "exact_match"}, ["eval.task=caption", "eval.metrics=cider"], None),
    ({"quantization_bit": 4, "quantization": {"skip": []}}, ["quantization=null"], None),
]


@pytest.mark.parametrize(("values", "overrides", "named"), SETTLED, ids=short)
def test_an_override_wins_over_the_file(
    values: dict[str, Any],
    overrides: list[str],
    named: str | None,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, logger="vlmtune")
    load_recipe(write(folder, values), overrides)
    line = [] if named is None else [f"keys of recipe.yaml without effect: {named}"]
    assert log_of(caplog) == line
    caplog.clear()
    monkeypatch.chdir(folder)
    load_recipe(yaml.safe_load(Path("recipe.yaml").read_text()), overrides)
    assert log_of(caplog) == [text.replace("recipe.yaml", "recipe") for text in line]


def test_full_fine_tuning_is_one_key(folder: Path) -> None:
    recipe = load_recipe(write(folder, {"modules_to_save": "all"})).recipe
    assert (recipe.lora_target, recipe.modules_to_save) == ([], ["all"])
    recipe = load_recipe(write(folder, {"modules_to_save": "connector"})).recipe
    assert (recipe.lora_target, recipe.modules_to_save) == (["all-linear"], ["connector"])


LISTS = [key for key, info in walk_keys() if info.annotation == list[Name]]


@pytest.mark.parametrize("key", LISTS)
def test_a_single_name_is_a_list_of_one(key: str, folder: Path) -> None:
    given: dict[str, Any] = {"quantization_bit": 4} if key == "quantization.skip" else {}
    one = load_recipe(write(folder, {**given, key: "lm_head"})).recipe
    assert one == load_recipe(write(folder, {**given, key: ["lm_head"]})).recipe
    assert one == load_recipe(write(folder, given), [f"{key}=lm_head"]).recipe
    assert one != load_recipe(write(folder, {**given, key: ["lm", "head"]})).recipe


def test_every_list_of_names_takes_one(folder: Path) -> None:
    assert {"lora_target", "modules_to_save", "quantization.skip", "eval.metrics"} < set(LISTS)
    parts = load_recipe(write(folder, {"parts": {"vision": "model.visual"}})).recipe.parts
    assert parts == {"vision": ["model.visual"]}
    in_editors = recipe_json_schema()["properties"]["lora_target"]["anyOf"]
    assert {"type": "string", "minLength": 1} in in_editors


def test_a_wrong_value_hides_no_key_without_effect_and_makes_none(folder: Path) -> None:
    values = {"quantization_bit": 5, "quantization.skip": [], "eval.decoding": {"top_k": 3}}
    with pytest.raises(ErrorGroup) as raised:
        load_recipe(write(folder, values))
    assert [str(error.message).split(" ")[0] for error in raised.value.errors] == [
        "bad",
        "eval.decoding.top_k",
    ]


def test_what_each_need_names_is_a_key() -> None:
    known = {key for key, _ in walk_keys()}
    for effect in effects().values():
        needs = [effect.needs] if isinstance(effect.needs, dict) else list(effect.needs)
        if isinstance(effect.changes_step, dict):
            needs.append(effect.changes_step)
        assert {cause for condition in needs for cause in condition} <= known
        assert effect.do.keys() <= {cause for condition in needs for cause in condition}
        assert effect.belongs_to is None or effect.belongs_to in known


def test_values_in_effect_leaves_out_idle_keys_and_nothing_else() -> None:
    values: dict[str, Any] = {
        "eval": {"decoding": {"method": "beam", "num_beams": 3, "top_k": 5}},
        "rank": 4,
    }
    kept = {"eval": {"decoding": {"method": "beam", "num_beams": 3}}, "rank": 4}
    assert values_in_effect(values) == kept
    assert values["eval"]["decoding"]["top_k"] == 5  # a copy
    only_idle = {"quantization": {"double_quant": True}, "rank": 4}
    assert values_in_effect(only_idle) == {"rank": 4}  # no empty section is left
