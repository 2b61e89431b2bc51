"""The figures of a whole set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests.data.processors import build_processor
from vlmtune.data.dataset import load_conversations, open_files
from vlmtune.data.encode import Encoder
from vlmtune.data.measure import Measurer
from vlmtune.recipe.data_section import DataEntry
from vlmtune.report.data_stats import SetStatistics, figures, set_statistics

NUM_ROWS = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("small", (16, 16)), ("large", (64, 64))):
        PIL.Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    return tmp_path


def ask(number: int, *pictures: str, answer: str = "red") -> dict[str, Any]:
    images = [{"type": "image", "image": f"{name}.png"} for name in pictures]
    content = [*images, {"type": "text", "text": f"Is it {number}?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": f"row-{number}", "messages": turns}


def rows() -> list[dict[str, Any]]:
    return [
        ask(n, *["small", "large"][: n % 3], answer="dark red " * (n + 1)) for n in range(NUM_ROWS)
    ]


def write(folder: Path, values: Sequence[dict[str, Any]]) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def look_at(folder: Path, values: Sequence[dict[str, Any]], **options: Any) -> SetStatistics:
    entries = [DataEntry(path=str(write(folder, values)))]
    return set_statistics(open_files(entries, cache_dir=folder / "cache"), **options)


def encoder(**options: Any) -> Encoder:
    settings = {"max_tokens": 2048, "over_length": "error", "max_image_pixels": 10_000} | options
    return Encoder(build_processor("qwen"), **settings)


def test_counts_are_those_of_the_samples(folder: Path):
    found = look_at(folder, rows())
    assert list(found.counts["turns"]) == [2] * NUM_ROWS
    assert list(found.counts["pictures"]) == [n % 3 for n in range(NUM_ROWS)]
    assert list(found.counts["answer words"]) == [2 * (n + 1) for n in range(NUM_ROWS)]
    assert list(found.counts["answer characters"]) == [9 * (n + 1) for n in range(NUM_ROWS)]
    assert "tokens" not in found.counts
    assert (found.duplicates.num_pictures, found.duplicates.num_picture_uses) == (2, 12)


def test_tokens_are_those_that_training_would_make(folder: Path):
    found = look_at(folder, rows(), measurer=Measurer(encoder()))
    full = encoder()
    samples = [full.encode(c) for c in load_conversations([folder / "a.jsonl"])[0]]
    assert list(found.counts["tokens"]) == [s.num_tokens for s in samples]
    assert list(found.counts["supervised tokens"]) == [s.num_supervised for s in samples]
    pad = full.processor.image_token_id
    assert list(found.counts["media tokens"]) == [int((s.input_ids == pad).sum()) for s in samples]
    assert len(set(found.counts["media tokens"])) == 3


def test_too_long_samples_and_changes_are_counted(folder: Path):
    lengths = sorted(look_at(folder, rows(), measurer=Measurer(encoder())).counts["tokens"])
    room = lengths[-3]
    dropping = Measurer(encoder(max_tokens=room, over_length="drop"))
    found = look_at(folder, rows(), measurer=dropping)
    over = sum(length > room for length in lengths)
    assert (found.num_dropped, found.num_samples, found.bad.count) == (over, NUM_ROWS - over, 0)
    assert over > 0
    refusing = look_at(folder, rows(), measurer=Measurer(encoder(max_tokens=room)))
    assert (refusing.num_dropped, refusing.bad.count) == (0, over)
    trimming = Measurer(encoder(max_tokens=room, over_length="trim_text"))
    assert sum(look_at(folder, rows(), measurer=trimming).notes.values()) == over


def test_rows_with_answers_only_are_measured_as_questions(folder: Path):
    question = ask(0, "small") | {"answers": ["red"]}
    question["messages"] = question["messages"][:1]
    found = look_at(folder, [question], measurer=Measurer(encoder()))
    assert found.bad.count == 0
    assert list(found.counts["supervised tokens"]) == [0]


def test_a_part_is_chosen_evenly(folder: Path):
    found = look_at(folder, rows(), max_samples=4)
    assert (found.num_rows, found.num_looked_at) == (NUM_ROWS, 4)
    assert list(found.rows) == [0, 3, 7, 11]
    assert found.place(2).line == 8


def test_repeated_samples_are_named_by_place(folder: Path):
    bad = {"id": "x"}
    found = look_at(folder, [ask(0), bad, ask(1), ask(0) | {"id": "other"}])
    assert found.bad.count == 1
    [(first, again)] = found.duplicates.examples
    assert [found.place(at).line for at in (first, again)] == [1, 4]


def test_figures_by_hand():
    of = figures([1, 1, 1, 1, 2, 5, 5])
    assert (of.mean, of.percentiles) == (16 / 7, (1, 1, 1, 5, 5))
    assert of.bins == ((1, 1, 4), (2, 2, 1), (3, 3, 0), (4, 4, 0), (5, 5, 2))
    assert of.bars == "█▂  ▄"
    assert figures([7]).bars == "█"


def test_a_bin_with_one_of_very_many_is_not_blank():
    assert figures([0] * 100_000 + [1]).bars == "█▁"
