"""The formats that are known, and which one a row is in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmtune.data.formats import messages, sharegpt
from vlmtune.data.formats.rows import Row, describe
from vlmtune.data.types import Conversation
from vlmtune.errors import nearest


@dataclass(frozen=True)
class Format:
    """`turn_keys` are the keys that a turn of this format has and one of another does not."""

    turn_keys: frozenset[str]
    parse: Callable[[Row, list[dict[str, Any]]], Conversation]


FORMATS: dict[str, Format] = {
    "messages": Format(messages.TURN_KEYS, messages.parse),
    "sharegpt": Format(sharegpt.TURN_KEYS, sharegpt.parse),
}
_EXPECTED = "turns of role and content (messages) or of from and value (ShareGPT)"


def parse_row(row: Row) -> Conversation:
    """The row as a conversation, in the format that its turns' keys show.

    Raises SampleError with the row's place where it is in no format, or in two.
    """
    turns = _turns(row)
    found = sorted(
        name
        for name, known in FORMATS.items()
        if any(known.turn_keys & set(turn) for turn in turns)
    )
    if len(found) > 1:
        raise row.error(
            "the turns mix formats", got=" and ".join(found), expected="one format in a row"
        )
    if not found:
        raise row.error(
            "the turns are in no known format",
            got=", ".join(sorted({key for turn in turns for key in turn})) or "no keys",
            expected=_EXPECTED,
        )
    return FORMATS[found[0]].parse(row, turns)


def _turns(row: Row) -> list[dict[str, Any]]:
    given = [key for key in ("messages", "conversations") if key in row.values]
    if len(given) == 2:
        raise row.error("both messages and conversations are given", expected="one of them")
    if not given:
        close = next(
            (key for key in row.values if nearest(key, ("messages", "conversations"))), None
        )
        raise row.error(
            "there are no messages",
            got=f"keys {', '.join(map(str, row.values))}" if row.values else "no keys",
            expected="messages or conversations",
            do=f"is {close!r} misspelt?" if close else None,
        )
    turns = row.values[given[0]]
    if not isinstance(turns, list):
        raise row.error(f"{given[0]} is not a list", got=describe(turns), expected=_EXPECTED)
    if not turns:
        raise row.error(f"{given[0]} is empty", expected=_EXPECTED)
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise row.error(f"turn {number} is not an object", got=describe(turn))
    return turns
