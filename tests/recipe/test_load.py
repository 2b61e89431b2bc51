"""Loading: overrides, paths, and a resolved recipe that loads back to an equal one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmtune.errors import ErrorGroup, VlmtuneError
from vlmtune.recipe.data_section import DataEntry
from vlmtune.recipe.explain import OTHER_TOOLS, suggest, walk_keys
from vlmtune.recipe.load import (
    NO_MODEL,
    dump_recipe,
    load_recipe,
    load_resolved,
    load_settings,
    recipe_json_schema,
    recipe_of_files,
)
from vlmtune.recipe.schema import Recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

GOOD = """\
model: base
output_dir: runs/test
data: {train: train.jsonl, eval: [a.jsonl, sub/b.jsonl]}
train:
  learning_rate: 1e-4
  part_learning_rates: {vision: 2e-5}
"""

VARIANTS = {
    "lora": "rank: 4\nuse_rslora: true\n",
    "dora in 4 bit": "use_dora: true\nquantization_bit: 4\nquantization: {skip: [lm_head]}\n",
    "adalora": "adalora: {initial_rank: 6, target_rank: 2, warmup: 20, final: 0.5}\nalpha: 6\n",
    "adalora in 4 bit": "adalora: {}\nquantization_bit: 4\n",
    "8 bit": "quantization_bit: 8\nquantization: {skip: [lm_head]}\n",
    "full fine-tuning": "lora_target: []\nmodules_to_save: [all]\n",
    "connector only": "lora_target: []\nmodules_to_save: [connector]\nquantization_bit: 4\n",
    "parts and modules to save": "parts: {vision: [a.b]}\nmodules_to_save: [lm_head]\n",
    "text like numbers": "lora_target: ['1e-4', 'yes', 'null', 're:.*\\.q_proj']\n",
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    for file in ("train.jsonl", "a.jsonl", "sub/b.jsonl", "base/config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / "recipe.yaml").write_text(GOOD)
    return tmp_path / "recipe.yaml"


def reload(recipe: Recipe, path: Path) -> Recipe:
    path.write_text(dump_recipe(recipe))
    return load_recipe(path).recipe


@pytest.mark.parametrize("added", VARIANTS.values(), ids=VARIANTS.keys())
def test_resolved_recipe_loads_back_to_an_equal_one(recipe_file: Path, added: str) -> None:
    recipe_file.write_text(GOOD + added)
    recipe = load_recipe(recipe_file).recipe
    elsewhere = recipe_file.parent / "sub" / "resolved.yaml"
    assert reload(recipe, elsewhere) == recipe
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    assert reload(other, elsewhere) != recipe


def test_dumping_every_key_would_not_load_back(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD + VARIANTS["adalora"])
    everything = load_recipe(recipe_file).recipe.model_dump(mode="json")
    recipe_file.write_text(yaml.safe_dump(everything))
    with pytest.raises(VlmtuneError, match="rank has no effect because adalora is given"):
        load_recipe(recipe_file)


def values(key: str) -> st.SearchStrategy[object]:
    numbers = {"alpha": (1e-6, 1e6), "dropout": (0, 0.99), "train.learning_rate": (1e-9, 1e3)}
    if key in numbers:
        return st.floats(*numbers[key])
    if key == "lora_target":
        return st.lists(st.text(min_size=1), min_size=1)
    return st.integers(min_value=1, max_value=2**31)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_values_survive_the_round_trip(recipe_file: Path, data: st.DataObject) -> None:
    recipe = load_recipe(recipe_file).recipe
    changes = {k: data.draw(values(k), k) for k in ("alpha", "dropout", "lora_target", "rank")}
    changes["seed"] = data.draw(values("seed"), "seed")
    train = {"learning_rate": data.draw(values("train.learning_rate"), "learning_rate")}
    recipe = recipe.model_copy(update=changes | {"train": recipe.train.model_copy(update=train)})
    assert reload(recipe, recipe_file.parent / "resolved.yaml") == recipe


@pytest.mark.parametrize("name", [path.name for path in sorted(CONFIGS.glob("*.yaml"))])
def test_shipped_recipe_loads_and_loads_back(root: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "data" / "easy_vqa").mkdir(parents=True)  # as scripts/prepare_easy_vqa.py makes it
    for file in ("train.jsonl", "test.jsonl"):
        (tmp_path / "data" / "easy_vqa" / file).touch()
    (tmp_path / "data" / "sample").symlink_to(root / "data" / "sample")
    (tmp_path / "configs").mkdir()
    shipped = tmp_path / "configs" / name
    shipped.write_text((CONFIGS / name).read_text())
    recipe = load_recipe(shipped).recipe
    assert reload(recipe, tmp_path / "resolved.yaml") == recipe


def test_resolved_recipe_of_a_run_is_read_without_its_data(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file).recipe
    resolved = recipe_file.parent / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe))
    (recipe_file.parent / "train.jsonl").unlink()
    assert load_resolved(resolved) == recipe
    with pytest.raises(VlmtuneError, match="no such data file"):
        load_recipe(resolved)
    resolved.write_text(resolved.read_text() + "rnak: 8\n")
    with pytest.raises(VlmtuneError, match="unknown key 'rnak'"):
        load_resolved(resolved)


def test_paths_are_relative_to_the_recipe_and_output_dir_stays(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file).recipe
    folder = str(recipe_file.parent)
    assert recipe.model == os.path.join(folder, "base")
    assert [entry.path for entry in recipe.data.train] == [os.path.join(folder, "train.jsonl")]
    assert recipe.data.eval == [
        DataEntry(path=os.path.join(folder, "a.jsonl")),
        DataEntry(path=os.path.join(folder, "sub", "b.jsonl")),
    ]
    assert recipe.output_dir == "runs/test"


def test_hub_id_stays_a_hub_id(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["model=org/name"]).recipe.model == "org/name"


def test_path_that_fits_the_working_directory_is_pointed_out(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe_file.parent / "sub")
    with pytest.raises(VlmtuneError, match="write sub/b.jsonl: paths are relative to the recipe"):
        load_recipe(recipe_file, ["data.train=b.jsonl"])


def test_overrides_win_over_the_file_and_are_yaml(recipe_file: Path) -> None:
    overrides = ["rank=4", "train.learning_rate=5e-5", "lora_target=[q_proj, 're:x=y']"]
    overrides += ["adalora=null", "train.part_learning_rates.connector=1", "output_dir=a=b"]
    recipe = load_recipe(recipe_file, overrides).recipe
    assert (recipe.rank, recipe.train.learning_rate) == (4, 5e-5)
    assert recipe.lora_target == ["q_proj", "re:x=y"]
    assert recipe.train.part_learning_rates == {"vision": 2e-5, "connector": 1}
    assert recipe.output_dir == "a=b"
    assert load_recipe(recipe_file).recipe.rank == 16


@pytest.mark.parametrize("text", ["in one word:", "a: b", "[x", "007", "true", "'quoted'"])
def test_an_override_of_a_text_needs_no_quotes(recipe_file: Path, text: str) -> None:
    given = [f"eval.embedding_prompt={text}", "objective=contrastive"]
    recipe = load_recipe(recipe_file, [*given, "data.eval=null"]).recipe
    assert recipe.eval.embedding_prompt == text.strip("'")
    with pytest.raises(ErrorGroup):  # a number that is no number stays an error
        load_recipe(recipe_file, ["rank=a: b"])


def test_override_makes_a_section_that_the_file_has_not(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["adalora.target_rank=4"]).recipe
    assert recipe.adalora is not None
    assert (recipe.adalora.target_rank, recipe.adalora.initial_rank) == (4, 12)


def test_override_null_takes_a_key_out_where_null_is_no_value(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD + VARIANTS["dora in 4 bit"])
    recipe = load_recipe(recipe_file, ["quantization=null", "use_dora=null"]).recipe
    assert recipe.quantization.skip == ["vision", "connector", "lm_head"]
    assert not recipe.use_dora
    assert load_recipe(recipe_file, ["train.max_grad_norm=null"]).recipe.train.max_grad_norm is None


def test_loaded_recipe_keeps_the_text_as_given(recipe_file: Path) -> None:
    text = "# why: a comment\n" + GOOD
    recipe_file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    loaded = load_recipe(recipe_file)
    assert (loaded.text, loaded.path) == (text, recipe_file)


def test_json_schema_knows_every_key() -> None:
    schema = recipe_json_schema()
    for key, _ in walk_keys():
        assert f"'{key.rsplit('.', 1)[-1]}':" in str(schema)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "output_dir", "data"}


def test_names_of_other_tools_lead_to_known_keys() -> None:
    known = {key for key, _ in walk_keys()}
    assert set(OTHER_TOOLS.values()) <= known
    assert not set(OTHER_TOOLS) & known
    assert suggest(("lora_rank",)) == "rank"


def test_every_key_is_described() -> None:
    for key, info in walk_keys():
        assert info.description or not isinstance(info.default, (int, float, str, list)), key


def test_files_with_settings_are_a_recipe() -> None:
    settings = ["columns={image: a}", "columns.caption=b", "data.on_bad_sample=skip", "rank=4"]
    recipe = recipe_of_files(["a.csv", "hub:b/c"], settings)
    assert recipe.data.train == [
        DataEntry(path=path, columns={"image": "a", "caption": "b"})
        for path in ("a.csv", "hub:b/c")
    ]
    assert (recipe.data.on_bad_sample, recipe.rank, recipe.model) == ("skip", 4, NO_MODEL)
    assert recipe_of_files(["a"], ["model=base", "revision=main"]).revision == "main"


def test_every_wrong_setting_of_files_is_named_as_it_was_written(tmp_path: Path) -> None:
    settings = ["colums.image=a", "weight=0", f"image_dir={tmp_path / 'gone'}", "data.evl=x"]
    with pytest.raises(ErrorGroup) as caught:
        recipe_of_files(["a.csv"], settings)
    first, second, third, fourth = str(caught.value).splitlines()
    assert first == "override 'colums.image=a': unknown key 'colums'; did you mean 'columns'?"
    assert second.startswith("override 'weight=0': bad value of weight; got: 0; expected: a number")
    assert third.startswith(f"override 'image_dir={tmp_path / 'gone'}': no such folder of pictures")
    assert fourth == "override 'data.evl=x': unknown key 'data.evl'; did you mean 'data.eval'?"


@pytest.mark.parametrize("setting", ["data.train=hub:a/b", "data={train: hub:a/b}"])
def test_files_are_not_set_twice(setting: str) -> None:
    with pytest.raises(VlmtuneError, match=r"data\.train is set, and files are given as well"):
        recipe_of_files(["a.csv"], [setting])


def test_settings_of_a_command_leave_out_metrics_of_another_task() -> None:
    def load(*overrides: str) -> Recipe:
        values = {"eval": {"task": "choice", "metrics": ["choice_likelihood"], "max_new_tokens": 9}}
        return load_settings(overrides, taken=["eval.*"], values=values)[0]

    other = load("eval.task=vqa", "eval.max_new_tokens=4").eval
    assert (other.metrics, other.max_new_tokens) == ([], 4)
    assert load("eval.task=vqa", "eval.metrics=[anls]").eval.metrics == ["anls"]
    same = load("eval.task=choice").eval  # a value that was not set may be without effect
    assert (same.metrics, same.max_new_tokens) == (["choice_likelihood"], 9)
    with pytest.raises(ErrorGroup, match="eval.max_new_tokens has no effect because eval.metrics"):
        load("eval.max_new_tokens=4")
