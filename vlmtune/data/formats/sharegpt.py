"""ShareGPT and LLaVA: `from` and `value`, `<image>` in the text, the pictures beside the turns.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                         {"from": "gpt", "value": "A cat."}]}

`<video>` stands for one of `video` or `videos`. Where a row lists videos and no picture, so does
`<image>`, as LLaVA's video data has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.beside import MEDIA_KEYS, NOUNS, MediaBeside, media_beside
from vlmtune.data.formats.rows import Row, build_conversation, listed
from vlmtune.data.formats.turns import WEIGHT_KEYS, has_turns_with, turns_of, weight_of
from vlmtune.data.text import describe
from vlmtune.data.types import Conversation, Part, Role, Text, Turn
from vlmtune.errors import nearest
from vlmtune.recipe.data_section import DataEntry

TURN_KEYS = frozenset({"from", "value"}) | WEIGHT_KEYS
KEYS = MEDIA_KEYS | {"messages", "conversations"}
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row's turns have the keys of this format."""
    return has_turns_with(values, {"from", "value"})


def parse(row: Row) -> Conversation:
    """The conversation of a row whose turns have `from` and `value`."""
    beside = media_beside(row, always=True)
    if beside.given["video"] and not beside.given["image"]:
        beside.placeholders["<image>"] = "video"
    parsed = [
        _turn(turn, number, row, beside) for number, turn in enumerate(turns_of(row), start=1)
    ]
    beside.check_all_taken()
    return build_conversation(row, parsed)


def _turn(turn: dict[str, Any], number: int, row: Row, beside: MediaBeside) -> Turn:
    for key in ("from", "value"):
        if key not in turn:
            raise row.error(
                f"turn {number} has no {key}", got=listed(turn) or "no keys", expected=key
            )
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in ROLES:
        close = nearest(speaker, ROLES) if isinstance(speaker, str) else None
        raise row.error(
            f"turn {number} has an unknown speaker",
            got=describe(speaker),
            expected=" | ".join(ROLES),
            do=f"did you mean {close!r}?" if close else None,
        )
    role = ROLES[speaker]
    weight = weight_of(turn, number, role, row)
    value = row.text(turn["value"], place=f"turn {number}")
    if role == "user":
        return Turn(role, tuple(beside.split(value)))
    for word, kind in beside.placeholders.items():
        # `<video>` is an element of HTML too: in an answer it may stand for itself.
        if word in value and (word == "<image>" or beside.given[kind]):
            raise row.error(
                f"turn {number} ({speaker}) holds a {NOUNS[kind]}",
                expected=f"{NOUNS[kind]}s in human turns only",
            )
    parts: tuple[Part, ...] = (Text(value),) if value else ()
    return Turn(role, parts, weight)
