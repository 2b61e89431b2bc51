"""Rows that list their turns: where the list is, and what a turn says of its own weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vlmtune.data.formats.rows import Row
from vlmtune.data.text import describe
from vlmtune.data.types import Role
from vlmtune.errors import nearest

LIST_KEYS = ("messages", "conversations")
WEIGHT_KEYS = frozenset({"train", "weight"})
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6
"""Between them, so that sums over a step stay exact enough in float32."""


def turns_of(row: Row) -> list[dict[str, Any]]:
    """The objects in the row's `messages` or `conversations`. Raises SampleError."""
    given = [key for key in LIST_KEYS if key in row.values]
    if len(given) == 2:
        raise row.error("both messages and conversations are given", expected="one of them")
    if not given:
        close = next((key for key in row.values if nearest(key, LIST_KEYS)), None)
        raise row.error(
            "there are no messages",
            got=row.keys,
            expected="messages or conversations",
            do=f"is {close!r} misspelt?"
            if close
            else "name the format of such rows, or which column is what: "
            "data.train: [{path: …, format: …, columns: {image: …, caption: …}}]",
        )
    turns = row.values[given[0]]
    if not isinstance(turns, list):
        raise row.error(f"{given[0]} is not a list", got=describe(turns), expected="a list")
    if not turns:
        raise row.error(f"{given[0]} is empty", expected="turns")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise row.error(f"turn {number} is not an object", got=describe(turn))
    return turns


def has_turns_with(values: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """Whether some turn of a row has one of `keys`; where turns have no keys at all, yes."""
    for name in LIST_KEYS:
        turns = values.get(name)
        if name in values and not isinstance(turns, list):
            return True  # its own parser says what is wrong
        objects = [turn for turn in turns or [] if isinstance(turn, dict) and turn]
        if name in values and (not objects or any(set(keys) & turn.keys() for turn in objects)):
            return True
    return False


def has_turns(values: Mapping[str, Any]) -> bool:
    """Whether the row lists its turns."""
    return any(name in values for name in LIST_KEYS)


def part_types(values: Mapping[str, Any]) -> set[str]:
    """The types of all parts in the row's turns."""
    return {
        part["type"]
        for name in LIST_KEYS
        if isinstance(turns := values.get(name), list)
        for turn in turns
        if isinstance(turn, dict) and isinstance(turn.get("content"), list)
        for part in turn["content"]
        if isinstance(part, dict) and isinstance(part.get("type"), str)
    }


def unused_turn_keys(values: Mapping[str, Any], keys: frozenset[str]) -> set[str]:
    """The keys of the row's turns that are not among `keys`, as `messages[].name`."""
    return {
        f"{name}[].{key}"
        for name in LIST_KEYS
        if isinstance(turns := values.get(name), list)
        for turn in turns
        if isinstance(turn, dict)
        for key in turn.keys() - keys
    }


def weight_of(turn: Mapping[str, Any], number: int, role: Role, row: Row) -> float:
    """What each token of a turn counts in the loss: its `weight`, 0 with `train: false`, else 1.

    Raises SampleError where it says both, or is not the assistant's.
    """
    trained, weight = turn.get("train"), turn.get("weight")
    given = [key for key, value in (("train", trained), ("weight", weight)) if value is not None]
    if not given:
        return 1.0
    if role != "assistant":
        raise row.error(
            f"turn {number} ({role}) has a {given[0]} key",
            expected="it on assistant turns only: no other turn is trained on",
        )
    if len(given) == 2:
        raise row.error(f"turn {number} has both train and weight", expected="one of them")
    if weight is None:
        if not isinstance(trained, bool):
            raise row.error(
                f"train of turn {number} cannot be used",
                got=describe(trained),
                expected="true or false",
            )
        return float(trained)
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not (weight == 0 or SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT):
        raise row.error(
            f"weight of turn {number} cannot be used",
            got=describe(weight),
            expected=f"0, or a number from {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:,.0f}",
        )
    return float(weight)
