"""The project's own form: `role` and `content`, the content a text or a list of parts.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                               {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}]}

`{"type": "image"}` without a picture, and `<image>` in a user's text, take the next one of the
row's `images` where the row lists any; videos and `<video>` alike. Such a part may have the `index`
that the picture has there. An assistant's turn may have `train: false` or a `weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.beside import (
    MEDIA_KEYS,
    NOUNS,
    MediaBeside,
    MediaKind,
    media_beside,
    picture,
    video,
)
from vlmtune.data.formats.rows import Row, build_conversation, listed, merge_texts
from vlmtune.data.formats.turns import WEIGHT_KEYS, has_turns_with, part_types, turns_of, weight_of
from vlmtune.data.text import describe
from vlmtune.data.types import Conversation, Part, Role, Text, Turn
from vlmtune.errors import nearest
from vlmtune.recipe.data_section import DataEntry

TURN_KEYS = frozenset({"role", "content"}) | WEIGHT_KEYS
KEYS = MEDIA_KEYS | {"messages", "conversations"}
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
PART_TYPES = ("text", "image", "video")
OPENAI_PARTS = frozenset({"image_url", "input_image", "input_text", "output_text", "video_url"})


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row's turns have the keys of this format, and no part that OpenAI's has."""
    return has_turns_with(values, {"role", "content"}) and not part_types(values) & OPENAI_PARTS


def parse(row: Row) -> Conversation:
    """The conversation of a row whose turns have `role` and `content`."""
    beside = media_beside(row, always=False)
    parsed = [
        _turn(turn, number, row, beside) for number, turn in enumerate(turns_of(row), start=1)
    ]
    beside.check_all_taken()
    return build_conversation(row, parsed)


def _turn(turn: dict[str, Any], number: int, row: Row, beside: MediaBeside) -> Turn:
    for key in ("role", "content"):
        if key not in turn:
            raise row.error(
                f"turn {number} has no {key}", got=listed(turn) or "no keys", expected=key
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
            parts.extend(_part(part, f"{place}, part {index}", role, row, beside))
    else:
        parts = _text(content, place, role, row, beside)
    return Turn(role, merge_texts(parts), weight_of(turn, number, role, row))


def _part(part: object, place: str, role: Role, row: Row, beside: MediaBeside) -> list[Part]:
    if not isinstance(part, dict):
        raise row.error(f"{place} is not an object", got=describe(part), expected='{"type": …, …}')
    # Columns of objects fill in every key: what is null is not there.
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.get("type")
    if kind is None:
        raise row.error(
            f"{place} has no type", got=listed(part) or "no keys", expected=" | ".join(PART_TYPES)
        )
    if kind not in PART_TYPES:
        raise row.error(
            f"{place} has an unknown type", got=describe(kind), expected=" | ".join(PART_TYPES)
        )
    if kind != "text" and kind not in given and beside.given[kind]:
        _check_index(given.pop("index", None), place, kind, row, beside)
    unknown = sorted(given.keys() - {"type", kind})
    if unknown:
        raise row.error(
            f"{place} has an unknown key", got=listed(unknown), expected=f"{kind} and type"
        )
    if kind == "text":
        return _text(given.get("text"), place, role, row, beside)
    if kind == "image":
        from_list = "image" not in given and beside.given["image"]
        return [beside.take("image") if from_list else picture(given.get("image"), row)]
    from_list = "video" not in given and beside.given["video"]
    return [beside.take("video") if from_list else video(given.get("video"), row)]


def _check_index(index: object, place: str, kind: MediaKind, row: Row, beside: MediaBeside) -> None:
    """Raise SampleError where a part says by `index` (0-based) which of the row's list it is, and
    that is not the next."""
    expected = beside.num_taken[kind]
    if index is not None and (index != expected or isinstance(index, bool)):
        raise row.error(
            f"{place} takes its {NOUNS[kind]} out of order",
            got=f"index: {describe(index)}",
            expected=f"index: {expected}, as the {kind}s of the row are taken in turn",
        )


def _text(text: object, place: str, role: Role, row: Row, beside: MediaBeside) -> list[Part]:
    checked = row.text(text, place=place)
    if role == "user":
        return beside.split(checked)
    return [Text(checked)] if checked else []
