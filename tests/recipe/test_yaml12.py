"""YAML 1.2 scalars, places, and the dumper that 1.1 readers understand too."""

from __future__ import annotations

import math

import pytest
import yaml

from vlmtune.errors import VlmtuneError
from vlmtune.recipe.yaml import dump_yaml, parse_yaml


def value_of(text: str) -> object:
    document, errors = parse_yaml(text, file="f")
    assert errors == []
    return document.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1E+3", -1000.0),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-02", "2024-01-02"),
        ("0b11", "0b11"),
        ("tRUE", "tRUE"),
        ("'1e-4'", "1e-4"),
        ("!!str 5", "5"),
        ("!!float 5", 5.0),
        ("-.inf", -math.inf),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    got = value_of(text)
    assert got == value
    assert type(got) is type(value)


def test_yaml_1_1_reads_the_same_scalars_otherwise() -> None:
    wrong = [yaml.safe_load(text) for text in ("1e-4", "010", "yes", "1:30")]
    assert wrong == ["1e-4", 8, True, 90]


def test_every_key_and_item_has_its_line() -> None:
    document, _ = parse_yaml("a: 1\nb:\n  c: [x,\n    y]\n  d:\n    - e: 2\n", file="f")
    assert document.lines == {
        (): 1,
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "c", 0): 3,
        ("b", "c", 1): 4,
        ("b", "d"): 5,
        ("b", "d", 0): 6,
        ("b", "d", 0, "e"): 6,
    }


def test_anchors_and_aliases_are_followed() -> None:
    assert value_of("a: &x {k: [1]}\nb: *x") == {"a": {"k": [1]}, "b": {"k": [1]}}


def test_aliases_that_explode_are_refused() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for at in range(1, 9):
        bomb += f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 10)}]\n"
    with pytest.raises(VlmtuneError, match="too large once its aliases are followed"):
        parse_yaml(bomb, file="f")


@pytest.mark.parametrize(
    "text",
    ["1e-4", "yes", "on", "true", "null", "", "~", "010", "0o10", "1:30", "2024-01-02", ".5"]
    + [
        "#x",
        "a: b",
        "- a",
        "é",
        "line\nbreak",
        "tab\t",
        "\x85",
        "a \u2028b",
        "'",
        '"',
        "*a",
        "&a",
        "!a",
        "{",
        " a ",
    ],
)
def test_text_stays_text_for_readers_of_1_1_and_1_2(text: str) -> None:
    dumped = dump_yaml({"k": [text], text: 1})
    assert value_of(dumped) == {"k": [text], text: 1}
    assert yaml.safe_load(dumped) == {"k": [text], text: 1}


@pytest.mark.parametrize("number", [1e-4, 1e-05, 3e20, 0.1, 1.0, 123456789, -5, 5e-324])
def test_numbers_stay_the_same_for_readers_of_1_1_and_1_2(number: float) -> None:
    dumped = dump_yaml({"k": number})
    assert value_of(dumped) == {"k": number}
    assert yaml.safe_load(dumped) == {"k": number}
