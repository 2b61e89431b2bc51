from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.run_entries import RunData, RunEntry, entry_as_in_run
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.data_section import DataEntry

GERMAN = {"question": "Frage", "answer": "Antwort"}
FRENCH = {"question": "question", "answer": "réponse"}


def entry(path: Path | str, **keys: Any) -> DataEntry:
    return DataEntry(path=str(path), **keys)


def chosen(file: Path | str, **sets: list[DataEntry]) -> RunEntry:
    """For a run `r`; the set called `guard` is that of eval.guard."""
    guard = sets.pop("guard", [])
    by_key = {f"data.{name}": entries for name, entries in sets.items()}
    return entry_as_in_run(file, RunData("r", by_key, guard))


def test_another_file_of_the_kind_is_read_with_the_keys_of_the_first_set_that_has_some() -> None:
    train = [entry("/d/train.csv", columns=GERMAN, prompt="Was?", weight=2.0)]
    found = chosen("test.tsv", eval=[], train=train)
    assert found.entry == entry("test.tsv", columns=GERMAN, prompt="Was?")
    assert found.note == (
        "test.tsv: read like data.train of r: "
        "columns {question: Frage, answer: Antwort}, prompt 'Was?'"
    )
    held_out = [entry("/d/eval.csv", columns=FRENCH)]
    assert chosen("test.csv", eval=held_out, train=train).entry.columns == FRENCH
    other_kind = [entry("/d/eval.jsonl", image_dir="/d")]
    assert chosen("test.csv", eval=other_kind, train=train).entry.columns == GERMAN


def test_a_file_of_the_run_is_read_with_every_key_of_its_own_entry(tmp_path: Path) -> None:
    questions = tmp_path / "questions.json"
    (tmp_path / "linked").symlink_to(tmp_path)
    train = [
        entry(tmp_path / "a.json", prompt="?"),
        entry(questions, annotations="/d/answers.json"),
    ]
    for file in (questions, tmp_path / "linked" / "questions.json"):
        assert chosen(file, train=train).entry == entry(file, annotations="/d/answers.json")
    guarded = [entry(tmp_path / "known.json", image_dir="/known")]
    found = chosen(tmp_path / "known.json", train=train, guard=guarded)
    assert found.entry.image_dir == "/known"
    # What is about one file alone is not said of another, and the guard's is not likened to.
    found = chosen("test.json", train=train[1:], guard=guarded)
    assert (found.entry, found.note) == (entry("test.json"), "")


@pytest.mark.parametrize(
    ("file", "train"),
    [
        ("test.parquet", entry("/d/train.csv", columns=GERMAN)),
        ("test.csv", entry("hub:a/b", columns=GERMAN)),
        ("test.jsonl", entry("/d/train.json", format="alpaca")),
        ("test.jsonl", entry("/d/train-{00..07}.jsonl.gz", image_dir="/pictures")),
        ("gone/test", entry("/gone/train", prompt="Which animal?", format="class_folders")),
    ],
)
def test_kinds_are_told_by_name_as_the_runs_files_may_be_gone(file: str, train: DataEntry) -> None:
    keys = train.model_dump(exclude_defaults=True, exclude={"path"})
    assert chosen(file, train=[train]).entry == entry(file, **keys)
    other = chosen("test.tar", train=[train])
    assert other.entry == entry("test.tar")
    assert other.is_doubtful
    assert other.note.endswith("of r, which are for files of another kind")


def test_a_plain_eval_set_makes_a_file_plain_and_that_is_said() -> None:
    train = [entry("/d/train.csv", columns=GERMAN)]
    found = chosen("test.csv", eval=[entry("/d/eval.csv")], train=train)
    assert found.entry == entry("test.csv")
    assert found.is_doubtful
    assert "without columns of r, which do not apply: the file is read like data.eval" in found.note
    assert chosen("test.csv", train=[entry("/d/train.csv")]).note == ""


def test_entries_with_different_keys_are_refused_unless_one_has_none() -> None:
    several = [entry("/d/a.csv", columns=GERMAN), entry("/d/b.csv", columns=FRENCH)]
    with pytest.raises(VlmtuneError) as caught:
        chosen("test.csv", train=several)
    assert "r reads files of this kind in several ways" in str(caught.value)
    assert "Frage" in str(caught.value) and "réponse" in str(caught.value)
    assert "columns.ROLE=NAME" in str(caught.value)
    found = chosen("test.csv", train=[*several, entry("/d/c.csv")])
    assert (found.entry, found.is_doubtful) == (entry("test.csv"), True)
    assert "Frage" in found.note
    alike = [entry("/d/a.csv", columns=GERMAN, weight=3.0), entry("/d/b.csv", columns=GERMAN)]
    assert chosen("test.csv", train=[*alike, entry("/d/c.jsonl")]).entry.columns == GERMAN
    splits = [entry("/d/set", split="train"), entry("/d/set", split="more")]
    with pytest.raises(VlmtuneError, match="split 'train' or split 'more'"):
        chosen("/d/set", train=splits)


def test_an_entry_that_is_said_can_be_read_again() -> None:
    """What is taken is nothing but keys of the recipe."""
    found = chosen("test.csv", train=[entry("/d/train.csv", columns=GERMAN)]).entry
    assert DataEntry(**json.loads(found.model_dump_json())) == found
