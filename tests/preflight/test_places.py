"""Errors of the model, its modules and its scoring land on the line of the key they are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.preflight.checking import check_summary
from vlmtune.errors import VlmtuneError
from vlmtune.preflight.problems import Problems
from vlmtune.preflight.run import KeyLocations
from vlmtune.recipe.load import load_recipe

RECIPE = """\
# line 1
data: {train: train.jsonl, eval: train.jsonl}
image:
  max_pixels: 10000
train:
  learning_rate: 1e-4
lora_target:
  - q_proj
  - train
model: 'MODEL'
eval:
  task: vqa
output_dir: run
"""
LINES = {key: at for at, line in enumerate(RECIPE.splitlines(), 1) if (key := line.split(":")[0])}


def write(folder: Path, model: str = "base") -> Path:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("{}\n")
    (folder / model).mkdir()
    (folder / model / "config.json").write_text("{}")
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", model))
    return folder / "recipe.yaml"


def place_of(recipe: Path, error: VlmtuneError, *overrides: str, **options) -> tuple[str, int]:
    problems = Problems()
    KeyLocations(load_recipe(recipe, overrides)).add_error(problems, error, **options)
    [problem] = problems.found
    assert error.message in problem.message
    return problem.file, problem.line


def wrong_target() -> VlmtuneError:
    return VlmtuneError("lora_target: 'train' matches no linear layer", do="see modules_to_save")


FOLDERS = ["plain", "data", "model", "train/image", "my data: x/train: y", "lora_target/eval"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_word_of_a_path_is_taken_for_a_key(tmp_path: Path, folder: str):
    recipe = write(tmp_path / folder)
    assert place_of(recipe, wrong_target()) == (str(recipe), LINES["lora_target"])
    unnamed = VlmtuneError(f"{recipe.parent / 'base'} has no chat template")
    assert place_of(recipe, unnamed) == (str(recipe), LINES["model"])


@pytest.mark.parametrize("model", ["train", "data_image", "eval: x", "lora_target"])
def test_nor_one_of_the_models_name(tmp_path: Path, model: str):
    recipe = write(tmp_path / "r", model)
    source = str(recipe.parent / model)
    for message in (f"{source}: the processor cannot be loaded", f"the weights of {source} are"):
        assert place_of(recipe, VlmtuneError(message)) == (str(recipe), LINES["model"])


@pytest.mark.parametrize(
    "message",
    [
        "no image processor in the processor of the model, whose eval is odd",
        "data to train on is missing from 'image: train', and from eval/train: too",
    ],
)
def test_nor_an_english_word_or_what_is_quoted(tmp_path: Path, message: str):
    recipe = write(tmp_path / "r")
    error = VlmtuneError(f"something of {message}")
    assert place_of(recipe, error) == (str(recipe), LINES["model"])
    assert place_of(recipe, VlmtuneError(f"image: {message}")) == (str(recipe), LINES["image"])


def test_what_was_got_is_no_key_but_what_to_do_may_name_one(tmp_path: Path):
    recipe = write(tmp_path / "r")
    got = VlmtuneError("no chat template", got="train.learning_rate: 1, image.max_pixels")
    assert place_of(recipe, got) == (str(recipe), LINES["model"])
    do = VlmtuneError("the pixel budget is empty", do="set image.min_pixels and image.max_pixels")
    assert place_of(recipe, do) == (str(recipe), LINES["  max_pixels"])


def test_a_key_of_an_override_is_placed_there(tmp_path: Path):
    recipe = write(tmp_path / "data")
    override = "lora_target=[train]"
    assert place_of(recipe, wrong_target(), override) == (f"override {override!r}", None)
    assert place_of(recipe, wrong_target(), "rank=4") == (str(recipe), LINES["lora_target"])


def test_what_names_no_key_is_placed_at_the_first_written_of_those_it_is_about(tmp_path: Path):
    recipe = write(tmp_path / "data")
    about = ("eval.metrics", "eval.task", "data.eval")
    for override, place in {
        "rank=4": (str(recipe), LINES["  task"]),
        "eval.metrics=[train]": ("override 'eval.metrics=[train]'", None),
    }.items():
        unknown = VlmtuneError("unknown metric", got="'train'")
        assert place_of(recipe, unknown, override, about=about) == place


def test_the_check_places_an_unknown_target_and_metric(
    tmp_path: Path, tiny_vlm: Path, sample_data: Path
):
    recipe = write(tmp_path / "data")
    text = recipe.read_text().replace("base", str(tiny_vlm))
    recipe.write_text(text.replace("train.jsonl", str(sample_data / "train.jsonl")))
    found = check_summary(recipe, "eval.metrics=[train]", max_samples=4)["problems"]
    errors = [(p["file"], p["line"]) for p in found if p["severity"] == "error"]
    assert sorted(errors) == sorted(
        [(str(recipe), LINES["lora_target"]), ("override 'eval.metrics=[train]'", None)]
    )
