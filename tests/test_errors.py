"""Errors say where, what, got, expected, do; and cross process borders whole."""

from __future__ import annotations

import pickle

import pytest

from vlmtune.errors import CheckFailed, ErrorGroup, SampleError, VlmtuneError, nearest, plural


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (VlmtuneError("wrong"), "wrong"),
        (VlmtuneError("wrong", file="a.yaml"), "a.yaml: wrong"),
        (VlmtuneError("wrong", file="a.yaml", line=3), "a.yaml:3: wrong"),
        (
            VlmtuneError("wrong", file="a", line=1, got=0, expected="1", do="x"),
            "a:1: wrong; got: 0; expected: 1; do: x",
        ),
        (ErrorGroup([VlmtuneError("one"), VlmtuneError("two", file="f")]), "one\nf: two"),
    ],
)
def test_error_renders_what_it_is_given(error: VlmtuneError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize("kind", [VlmtuneError, SampleError, CheckFailed])
def test_error_survives_pickling(kind: type[VlmtuneError]) -> None:
    error = kind("wrong", file="a.yaml", line=3, got=1.5, do="this")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.exit_code) == (str(error), error.exit_code)


def test_group_survives_pickling() -> None:
    group = ErrorGroup([SampleError("one", line=1, file="f"), VlmtuneError("two")])
    copy = pickle.loads(pickle.dumps(group))
    assert isinstance(copy, ErrorGroup)
    assert [type(error) for error in copy.errors] == [SampleError, VlmtuneError]
    assert str(copy) == str(group)


def test_exit_codes() -> None:
    assert (VlmtuneError("x").exit_code, CheckFailed("x").exit_code) == (2, 1)


def test_nearest_finds_a_typo_and_nothing_in_noise() -> None:
    assert nearest("lerning_rate", ["rank", "learning_rate"]) == "learning_rate"
    assert nearest("zzz", ["rank", "learning_rate"]) is None


def test_one_thing_is_counted_in_the_singular():
    assert plural(1, "sample") == "1 sample"
    assert (plural(0, "sample"), plural(2000, "sample")) == ("0 samples", "2,000 samples")
    assert plural(2, "process", "processes") == "2 processes"
