"""The project's own form: `role` and `content`, the content a text or a list of parts.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                               {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}]}

`{"type": "image"}` without a picture, and `<image>` in a user's text, take the next one of the
row's `images` where the row lists any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.rows import (
    PICTURE_KEYS,
    Row,
    RowImages,
    build_conversation,
    has_turns_with,
    merge_texts,
    picture,
    text_part,
    turns_of,
)
from vlmtune.data.text import describe
from vlmtune.data.types import Conversation, Part, Role, Turn
from vlmtune.errors import nearest
from vlmtune.recipe.schema import DataEntry

TURN_KEYS = frozenset({"role", "content"})
KEYS = PICTURE_KEYS | {"messages", "conversations"}
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_PART_KEYS = {"text": {"type", "text"}, "image": {"type", "image"}}


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row's turns have the keys of this format."""
    return has_turns_with(values, TURN_KEYS)


def parse(row: Row) -> Conversation:
    """The conversation of a row whose turns have `role` and `content`."""
    images = RowImages(row)
    parsed = [
        _turn(turn, number, row, images) for number, turn in enumerate(turns_of(row), start=1)
    ]
    images.check_all_taken()
    return build_conversation(row, parsed)


def _turn(turn: dict[str, Any], number: int, row: Row, images: RowImages) -> Turn:
    for key in ("role", "content"):
        if key not in turn:
            raise row.error(
                f"turn {number} has no {key}", got=", ".join(turn) or "no keys", expected=key
            )
    role = turn["role"]
    if role not in ROLES:
        close = nearest(role, ROLES) if isinstance(role, str) else None
        raise row.error(
            f"turn {number} has an unknown role",
            got=describe(role),
            expected=" | ".join(ROLES),
            do=f"did you mean {close!r}?" if close else None,
        )
    content = turn["content"]
    place = f"turn {number}"
    if isinstance(content, list):
        parts: list[Part] = []
        for index, part in enumerate(content, start=1):
            parts.extend(_part(part, f"{place}, part {index}", role, row, images))
    else:
        parts = _text(content, place, role, row, images)
    return Turn(role, merge_texts(parts))


def _part(part: object, place: str, role: Role, row: Row, images: RowImages) -> list[Part]:
    if not isinstance(part, dict):
        raise row.error(f"{place} is not an object", got=describe(part), expected='{"type": …, …}')
    kind = part.get("type")
    if kind is None:
        raise row.error(
            f"{place} has no type", got=", ".join(part) or "no keys", expected="text | image"
        )
    if kind not in ("text", "image"):
        raise row.error(
            f"{place} has an unknown type",
            got=describe(kind),
            expected="text | image",
            do="videos arrive with a later version" if kind == "video" else None,
        )
    unknown = sorted(set(part) - _PART_KEYS[kind])
    if unknown:
        raise row.error(
            f"{place} has an unknown key",
            got=", ".join(unknown),
            expected=" and ".join(sorted(_PART_KEYS[kind])),
        )
    if kind == "text":
        return _text(part.get("text"), place, role, row, images)
    if "image" not in part and images.given:
        return [images.take()]
    return [picture(part.get("image"), row)]


def _text(text: object, place: str, role: Role, row: Row, images: RowImages) -> list[Part]:
    checked = text_part(text, row, place=place)
    # Without a list of pictures the word stands for itself.
    if role == "user" and images.given:
        return images.split(checked.text)
    return [checked] if checked.text else list[Part]()
