"""What rows have in common, measuring that turns out inexact, rooms and places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.preflight.checking import check_summary, messages
from tests.preflight.test_agrees_with_training import rows_of, write_rows
from tests.train.training import copy_sample, write_recipe
from vlmtune.data import measure
from vlmtune.data.dataset import load_conversations
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.models.load import load_processor
from vlmtune.preflight.epoch_stats import Disk, check_room, format_bytes
from vlmtune.preflight.rows import RowFailure, RowOutcome
from vlmtune.preflight.sets import GOOD, NOT_A_ROW, RowTable, sample_numbers
from vlmtune.recipe.load import load_recipe


@pytest.fixture
def data(sample_data: Path, tmp_path: Path) -> Path:
    return copy_sample(sample_data, tmp_path / "data", keep=16)


@pytest.fixture
def recipe(tiny_vlm: Path, data: Path, tmp_path: Path):
    def write(**keys: Any) -> Path:
        return write_recipe(tmp_path, tiny_vlm=tiny_vlm, data=data, **keys)

    return write


def test_repeated_samples_are_counted_and_the_first_is_named(recipe, data):
    rows = rows_of(data)
    for index in (4, 9, 12):
        rows[index] = rows[2] | {"id": f"again {index}"}
    write_rows(data, rows)
    summary = check_summary(recipe())
    [warning] = summary["problems"]
    assert (summary["verdict"], warning["line"]) == ("warnings", 5)
    assert "3 samples repeat another one" in warning["message"]
    assert f"the first repeats {data}:3" in warning["message"]
    assert summary["duplicates"]["data.train"] == 3


def test_overlap_is_told_by_picture_and_with_its_question(recipe, data):
    rows = rows_of(data)
    held_out = data.with_name("eval.jsonl")
    other_question = json.loads(json.dumps(rows[3]))
    other_question["messages"][0]["content"][-1]["text"] = "Something else?"
    write_rows(held_out, [rows[1], other_question])
    write_rows(data, rows[:4])
    summary = check_summary(recipe(data__eval=str(held_out)))
    both, pictures = messages(summary, "warning")
    assert "1 of 2 samples have the question and the pictures" in both
    assert "2 of 2 samples have a picture of data.train (2 pictures)" in pictures
    assert summary["overlap"]["data.eval"]["samples_with_both"] == 1


def test_sets_without_a_common_picture_do_not_warn(recipe, sample_data):
    summary = check_summary(recipe(data__eval=str(sample_data / "eval.jsonl")))
    assert (summary["verdict"], summary["overlap"]["data.eval"]["pictures"]) == ("ready", 0)


def test_where_sizes_do_not_tell_every_sample_is_encoded_in_full(recipe, monkeypatch):
    expected = check_summary(recipe())
    true_size = measure.PictureSizes.of

    def wrong_size(self, image):
        width, height = true_size(self, image)
        return (width * 2, height)

    monkeypatch.setattr(measure.PictureSizes, "of", wrong_size)
    found = check_summary(recipe())
    assert found["sets"]["data.train"].pop("encoded_in_full")
    assert not expected["sets"]["data.train"].pop("encoded_in_full")
    found["disk"] = expected["disk"] = None
    assert found == expected


def test_a_missing_file_is_a_problem_beside_the_others(recipe, data, tmp_path):
    broken = tmp_path / "data" / "broken.json"
    broken.write_text("[1, 2")
    empty = tmp_path / "data" / "empty.jsonl"
    empty.write_text("")
    path = recipe(data__train=[str(data), str(broken), str(empty)], data__eval=str(data))
    summary = check_summary(path)
    told = {(Path(p["file"]).name, p["severity"]) for p in summary["problems"]}
    assert {("broken.json", "error"), ("empty.jsonl", "error")} <= told
    assert summary["sets"]["data.eval"]["samples"] == 16, "the other set is looked at"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("quickstart", ["data.eval=null"]), ("easy_vqa_lora", ["data.eval=null"])],
)
def test_counts_are_those_of_full_encodings(root, name, overrides):
    """All samples of the sample task; of easy-VQA, where it has been prepared, 500."""
    path = root / "configs" / f"{name}.yaml"
    if name == "easy_vqa_lora" and not (root / "data/easy_vqa/train.jsonl").exists():
        pytest.skip("scripts/prepare_easy_vqa.py has not been run")
    recipe = load_recipe(path, overrides).recipe
    rows = rows_of(Path(recipe.data.train[0].path))
    limit = len(rows) if name == "quickstart" else 500
    chosen = [number * len(rows) // limit for number in range(limit)]
    found = check_summary(path, *overrides, max_samples=limit)["sets"]["data.train"]
    conversations, _ = load_conversations(recipe.data.train)
    processor = load_processor(recipe.model, image=recipe.image)
    encoder = Encoder(
        processor,
        max_tokens=recipe.data.max_tokens,
        over_length=recipe.data.over_length,
        max_image_pixels=recipe.data.max_image_pixels,
    )
    full = [encoder.encode(conversations[number]) for number in chosen]
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert not found["encoded_in_full"]
    assert [found[key] for key in ("samples", "tokens", "supervised_tokens", "images")] == [
        limit,
        sum(sample.num_tokens for sample in full),
        sum(sample.num_supervised for sample in full),
        sum(sample.num_images for sample in full),
    ]
    assert found["image_tokens"] == sum(int((s.input_ids == image_id).sum()) for s in full)


def test_weights_scale_an_epochs_figures(recipe, data):
    entries = [{"path": str(data), "weight": 0.5}]
    half, whole = check_summary(recipe(data__train=entries)), check_summary(recipe())
    assert half["epoch"]["samples"] == 8
    assert half["epoch"]["tokens"] == pytest.approx(whole["epoch"]["tokens"] / 2, abs=1)
    none = check_summary(recipe(data__train=[{"path": str(data), "weight": 0.01}]))
    assert any("gives an epoch without samples" in m for m in messages(none, "error"))


def test_rows_from_all_over_are_chosen():
    assert list(sample_numbers(16, 4)) == [0, 4, 8, 12]
    assert sample_numbers(16, None) == sample_numbers(16, 99) == range(16)


def outcome(name: str | None, line: int, failure: RowFailure | None = None) -> RowOutcome:
    return RowOutcome(name, f"f:{line}", Source("f.jsonl", line), failure=failure)


def test_an_id_is_taken_by_the_first_row_that_could_be_parsed():
    table = RowTable()
    bad = RowFailure("row", SampleError("no"))
    missing = RowFailure("media", SampleError("gone"))
    for row in (
        outcome("a", 1),
        outcome(None, 2, bad),
        outcome("b", 3, missing),
        outcome("a", 4),
        outcome(None, 5, bad),
        outcome("b", 6),
    ):
        table.add(row)
    assert list(table.repeated_ids()) == [(3, 0), (5, 2)]
    assert table.count(GOOD) == 3 and table.count(NOT_A_ROW) == 2


def test_a_full_disk_is_an_error_and_a_free_one_is_not(tmp_path):
    disk = Disk(1000, 3, 500, 0, needed_bytes=3500, free_bytes=3499)
    with pytest.raises(VlmtuneError, match="not enough disk space for the run") as caught:
        check_room(disk, tmp_path)
    assert "3.5 kB: 3 checkpoints of 1.0 kB" in str(caught.value)
    check_room(Disk(1000, 3, 500, 0, needed_bytes=3500, free_bytes=3500), tmp_path)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (123e6, "123 MB")],
)
def test_bytes_are_shown_in_few_digits(number, text):
    assert format_bytes(number) == text


def test_the_cache_is_counted_where_it_is_asked_for(recipe, tmp_path):
    path = recipe(data__cache="disk", data__cache_dir=str(tmp_path / "cache"))
    assert check_summary(path)["disk"]["cache_bytes"] > 16 * 64 * 384 * 4, "the pixels alone"
    assert check_summary(path, "data.cache=off")["disk"]["cache_bytes"] == 0


def test_a_checkpoint_is_as_large_as_it_was_said(recipe, tmp_path):
    from tests.train.training import train_once

    path = recipe()
    said = check_summary(path)["disk"]["checkpoint_bytes"]
    train_once(path)
    [*_, newest] = sorted((tmp_path / "run" / "checkpoints").iterdir())
    files = [newest / name for name in ("tensors.safetensors", "optimizer.pt")]
    assert sum(file.stat().st_size for file in files) == pytest.approx(said, rel=0.15)
