"""Samples left out: each listed once, and no more of them bad than the recipe allows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.training import copy_sample, train_once, write_recipe
from vlmtune.errors import VlmtuneError
from vlmtune.train.feed import SkippedSample
from vlmtune.train.run_folder import SkipLog, allowed_bad


def bad(name: str, line: int, file: str = "rows.jsonl") -> SkippedSample:
    return SkippedSample(name, file, line, "it is bad", is_bad=True)


def skip_log(folder: Path, fraction: float = 0.5) -> SkipLog:
    return SkipLog(folder / "skipped.jsonl", num_samples=10, max_bad_fraction=fraction)


def test_samples_of_one_id_are_told_apart_by_their_place(tmp_path: Path):
    kept = skip_log(tmp_path)
    kept.add([bad("7", 1), bad("7", 2), bad("7", 1, "other.jsonl")], write=True)
    kept.add([bad("7", 2)], write=True)
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    places = [("rows.jsonl", 1), ("rows.jsonl", 2), ("other.jsonl", 1)]
    assert [(row["file"], row["line"]) for row in listed] == places
    resumed = skip_log(tmp_path / "again")
    resumed.restore(json.loads(json.dumps(kept.as_list())))
    resumed.add([bad("7", 1)], write=False)
    assert (kept.num_bad, resumed.num_bad, resumed.num_left_out) == (3, 3, 3)


@pytest.mark.parametrize(
    ("fraction", "num", "allowed"),
    [(0.29, 100, 29), (0.7, 10, 7), (0.1, 30, 3), (0.09, 10, 0), (0.01, 199, 1), (1.0, 7, 7)],
)
def test_a_fraction_allows_whole_samples_and_loses_none_to_rounding(fraction, num, allowed):
    assert allowed_bad(fraction, num) == allowed


def test_the_first_beyond_the_limit_stops_the_run_and_the_limit_is_named(tmp_path: Path):
    kept = skip_log(tmp_path, fraction=0.29)
    kept.add([bad("a", 1), bad("b", 2)], write=False)
    with pytest.raises(VlmtuneError, match=r"3 of 10.*expected: at most 2 \(data.max_bad"):
        kept.add([bad("c", 3)], write=False)


def test_what_was_changed_is_counted_by_place_too(tmp_path: Path, tiny_vlm, sample_data):
    """Rows of one id, each cut, and seen more than once."""
    data = copy_sample(sample_data, tmp_path / "data", keep=3)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"] = "red " * 40
        row["id"] = "the same"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"data__streaming": True, "data__over_length": "trim_text", "data__max_tokens": 50}
    recipe = write_recipe(tmp_path, tiny_vlm=tiny_vlm, data=data, **keys, train__max_steps=2)
    [count] = train_once(recipe)["notes"].values()
    assert count == 3
