from __future__ import annotations

from vlmtune.report.headline import differences, parse_recipe, value_at


def test_only_what_differs_from_the_schema_is_listed() -> None:
    values = {
        "model": "tiny",
        "rank": 16,
        "alpha": 8.0,
        "train": {"learning_rate": 2e-4, "max_steps": 7},
        "eval": {"guard": None, "decoding": {"method": "beam"}},
    }
    found = {d.key: (d.value, d.default) for d in differences(values)}
    assert found == {
        "model": ("tiny", "required"),
        "alpha": ("8", "32"),
        "train.max_steps": ("7", "null"),
        "eval.decoding.method": ("beam", "greedy"),
    }


def test_a_key_of_another_version_is_listed_and_not_refused() -> None:
    found = differences({"rankk": 3})
    assert [(d.key, d.meaning) for d in found] == [("rankk", "this version has no such key")]


def test_numbers_are_read_as_the_recipe_reads_them() -> None:
    values = parse_recipe("train: {learning_rate: 1e-4}\n")
    assert value_at(values, "train.learning_rate") == 1e-4
    assert value_at(values, "train.epochs") is None


def test_a_broken_recipe_is_none() -> None:
    assert parse_recipe("a: [1,") is None
    assert parse_recipe("just words") is None
    assert parse_recipe(None) is None
