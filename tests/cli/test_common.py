"""What the commands share: which arguments are paths, and which are settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.cli.common import split_settings


def test_settings_are_told_from_paths_in_any_order():
    arguments = ["data.on_bad_sample=skip", "a.jsonl", "prompt=What is it?", "hub:someone/x=y"]
    paths, settings = split_settings(arguments)
    assert paths == ["a.jsonl", "hub:someone/x=y"]
    assert settings == ["data.on_bad_sample=skip", "prompt=What is it?"]


@pytest.mark.parametrize(
    "argument", ["./a=b.jsonl", "a-b=c", "a b=c", "=x", "a.=x", ".a=x", "data/year=2020/x.parquet"]
)
def test_what_is_no_word_before_the_sign_is_a_path(argument: str):
    assert split_settings([argument]) == ([argument], [])


@pytest.mark.parametrize("argument", ["year=2020", "year=*.jsonl", "year=2{019,020}/*.jsonl"])
def test_a_path_that_exists_is_no_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str
):
    monkeypatch.chdir(tmp_path)
    assert split_settings([argument]) == ([], [argument])
    (tmp_path / "year=2020").mkdir()
    for name in ("year=2020/part.jsonl", "year=2021.jsonl"):
        (tmp_path / name).touch()
    assert split_settings([argument]) == ([argument], [])
