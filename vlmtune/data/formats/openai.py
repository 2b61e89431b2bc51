"""OpenAI chat: as `messages`, with pictures as `image_url` parts.

    {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "a.png"}}]},
     {"role": "assistant", "content": "A cat."}]}

The url is a `data:` URL, a path or, where the recipe allows it, http(s). `input_text`,
`output_text` and `input_image` of the responses API, `video_url` and the role `developer` are
understood; `detail` has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmtune.data.formats import messages
from vlmtune.data.formats.beside import MEDIA_KEYS
from vlmtune.data.formats.rows import Row, listed
from vlmtune.data.formats.turns import LIST_KEYS, has_turns_with, part_types, turns_of
from vlmtune.data.text import describe
from vlmtune.data.types import Conversation
from vlmtune.errors import nearest
from vlmtune.recipe.data_section import DataEntry

TURN_KEYS = messages.TURN_KEYS
KEYS = frozenset(LIST_KEYS)
_MEDIA_PARTS = {
    "image_url": ("image", "image_url"),
    "input_image": ("image", "image_url"),
    "video_url": ("video", "video_url"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
PART_TYPES = (*_TEXT_PARTS, *_MEDIA_PARTS)


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the turns could be of this format: no part or key that only `messages` has."""
    if not has_turns_with(values, {"role", "content"}) or MEDIA_KEYS & values.keys():
        return False
    return not part_types(values) & {"image", "video"}


def parse(row: Row) -> Conversation:
    """The conversation of a row of OpenAI messages."""
    turns = [_rewritten_turn(turn, number, row) for number, turn in enumerate(turns_of(row), 1)]
    # Pictures beside the turns are none of this format's: they are among the unused keys.
    kept = {k: v for k, v in row.values.items() if k not in MEDIA_KEYS and k not in LIST_KEYS}
    return messages.parse(replace(row, values={**kept, "messages": turns}))


def _rewritten_turn(turn: dict[str, Any], number: int, row: Row) -> dict[str, Any]:
    """The turn as `messages` writes it."""
    rewritten = dict(turn)
    if turn.get("role") == "developer":
        rewritten["role"] = "system"
    if turn.get("tool_calls"):
        raise row.error(f"turn {number} calls tools", expected="turns of texts and pictures")
    content = turn.get("content")
    if isinstance(content, list):
        rewritten["content"] = [
            _rewritten_part(part, f"turn {number}, part {index}", row)
            for index, part in enumerate(content, start=1)
        ]
    return rewritten


def _rewritten_part(part: object, place: str, row: Row) -> object:
    if not isinstance(part, dict):
        return part
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.pop("type", None)
    if kind in _TEXT_PARTS:
        return {**given, "type": "text"}
    if kind not in PART_TYPES:
        close = nearest(kind, PART_TYPES) if isinstance(kind, str) else None
        raise row.error(
            f"{place} has no type" if kind is None else f"{place} has an unknown type",
            got=describe(kind) if kind is not None else listed(part) or "no keys",
            expected=" | ".join(PART_TYPES),
            do=f"did you mean {close!r}?" if close else None,
        )
    name, key = _MEDIA_PARTS[kind]
    value = given.pop(key, None)
    given.pop("detail", None)
    if given:
        raise row.error(f"{place} has an unknown key", got=listed(given), expected=key)
    url = value.get("url") if isinstance(value, dict) else value
    if isinstance(value, dict) and value.keys() - {"url", "detail"}:
        raise row.error(
            f"{place} has an unknown key in {key}", got=listed(value), expected="url and detail"
        )
    return {"type": name, name: url}
