"""ShareGPT and LLaVA: `from` and `value`, `<image>` in the text, the pictures beside the turns.

{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                     {"from": "gpt", "value": "A cat."}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.rows import (
    PICTURE_KEYS,
    PLACEHOLDER,
    Row,
    RowImages,
    build_conversation,
    has_turns_with,
    text_part,
    turns_of,
)
from vlmtune.data.text import describe
from vlmtune.data.types import Conversation, Part, Role, Turn
from vlmtune.errors import nearest
from vlmtune.recipe.schema import DataEntry

TURN_KEYS = frozenset({"from", "value"})
KEYS = PICTURE_KEYS | {"messages", "conversations"}
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row's turns have the keys of this format."""
    return has_turns_with(values, TURN_KEYS)


def parse(row: Row) -> Conversation:
    """The conversation of a row whose turns have `from` and `value`."""
    images = RowImages(row)
    parsed = [
        _turn(turn, number, row, images) for number, turn in enumerate(turns_of(row), start=1)
    ]
    images.check_all_taken()
    return build_conversation(row, parsed)


def _turn(turn: dict[str, Any], number: int, row: Row, images: RowImages) -> Turn:
    for key in ("from", "value"):
        if key not in turn:
            raise row.error(
                f"turn {number} has no {key}", got=", ".join(turn) or "no keys", expected=key
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
    value = text_part(turn["value"], row, place=f"turn {number}")
    if role == "user":
        return Turn(role, tuple(images.split(value.text)))
    if PLACEHOLDER in value.text:
        raise row.error(
            f"turn {number} ({speaker}) holds a picture", expected="pictures in human turns only"
        )
    parts: tuple[Part, ...] = (value,) if value.text else ()
    return Turn(role, parts)
