r"""Rows that list their turns: the project's own `messages`, OpenAI chat, ShareGPT and LLaVA.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                               {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}]}

`{"type": "image"}` without a picture, and `<image>` in a user's text, take the next one of the
row's `images` where the row lists any; videos and `<video>` alike. Such a part may have the `index`
that the picture has there. An assistant's turn may have `train: false` or a `weight`.

    {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "a.png"}}]},
     {"role": "assistant", "content": "A cat."}]}

The url is a `data:` URL, a path or, where the recipe allows it, http(s). `input_text`,
`output_text` and `input_image` of the responses API, `video_url` and the role `developer` are
understood; `detail` has no effect.

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                         {"from": "gpt", "value": "A cat."}]}

`<video>` stands for one of `video` or `videos`. Where a row lists videos and no picture, so does
`<image>`, as LLaVA's video data has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from vlmtune.data.formats.base import (
    MEDIA_KEYS,
    NOUNS,
    MediaKind,
    MediaPlaceholders,
    Row,
    build_conversation,
    listed,
    media_placeholders,
    merge_texts,
    picture,
    video,
)
from vlmtune.data.types import Conversation, Part, Role, Text, Turn
from vlmtune.errors import describe, nearest
from vlmtune.recipe.data_section import DataEntry

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
            else "set the format of such rows, or name their columns: "
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
            expected=f"{given[0]} on assistant turns only: no other turn is trained on",
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


MESSAGES_TURN_KEYS = frozenset({"role", "content"}) | WEIGHT_KEYS
MESSAGES_KEYS = MEDIA_KEYS | {"messages", "conversations"}
MESSAGES_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
MESSAGES_PART_TYPES = ("text", "image", "video")
OPENAI_PARTS = frozenset({"image_url", "input_image", "input_text", "output_text", "video_url"})


def matches_messages(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row's turns have the keys of this format, and no part that OpenAI's has."""
    return has_turns_with(values, {"role", "content"}) and not part_types(values) & OPENAI_PARTS


def parse_messages(row: Row) -> Conversation:
    """The conversation of a row whose turns have `role` and `content`."""
    media = media_placeholders(row, always=False)
    parsed = [
        _messages_turn(turn, number, row, media)
        for number, turn in enumerate(turns_of(row), start=1)
    ]
    media.check_all_taken()
    return build_conversation(row, parsed)


def _messages_turn(turn: dict[str, Any], number: int, row: Row, media: MediaPlaceholders) -> Turn:
    for key in ("role", "content"):
        if key not in turn:
            raise row.error(
                f"turn {number} has no {key}", got=listed(turn) or "no keys", expected=key
            )
    role = turn["role"]
    if role not in MESSAGES_ROLES:
        close = nearest(role, MESSAGES_ROLES) if isinstance(role, str) else None
        raise row.error(
            f"turn {number} has an unknown role",
            got=describe(role),
            expected=" | ".join(MESSAGES_ROLES),
            do=f"did you mean {close!r}?" if close else None,
        )
    content = turn["content"]
    place = f"turn {number}"
    if isinstance(content, list):
        parts: list[Part] = []
        for index, part in enumerate(content, start=1):
            parts.extend(_messages_part(part, f"{place}, part {index}", role, row, media))
    else:
        parts = _text(content, place, role, row, media)
    return Turn(role, merge_texts(parts), weight_of(turn, number, role, row))


def _messages_part(
    part: object, place: str, role: Role, row: Row, media: MediaPlaceholders
) -> list[Part]:
    if not isinstance(part, dict):
        raise row.error(f"{place} is not an object", got=describe(part), expected='{"type": …, …}')
    # Columns of objects fill in every key: what is null is not there.
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.get("type")
    if kind is None:
        raise row.error(
            f"{place} has no type",
            got=listed(part) or "no keys",
            expected=" | ".join(MESSAGES_PART_TYPES),
        )
    if kind not in MESSAGES_PART_TYPES:
        raise row.error(
            f"{place} has an unknown type",
            got=describe(kind),
            expected=" | ".join(MESSAGES_PART_TYPES),
        )
    if kind != "text" and kind not in given and media.given[kind]:
        _check_index(given.pop("index", None), place, kind, row, media)
    unknown = sorted(given.keys() - {"type", kind})
    if unknown:
        raise row.error(
            f"{place} has an unknown key", got=listed(unknown), expected=f"{kind} and type"
        )
    if kind == "text":
        return _text(given.get("text"), place, role, row, media)
    if kind == "image":
        from_list = "image" not in given and media.given["image"]
        return [media.take("image") if from_list else picture(given.get("image"), row)]
    from_list = "video" not in given and media.given["video"]
    return [media.take("video") if from_list else video(given.get("video"), row)]


def _check_index(
    index: object, place: str, kind: MediaKind, row: Row, media: MediaPlaceholders
) -> None:
    """Raise SampleError where a part says by `index` (0-based) which of the row's list it is, and
    that is not the next."""
    expected = media.num_taken[kind]
    if index is not None and (index != expected or isinstance(index, bool)):
        raise row.error(
            f"{place} takes its {NOUNS[kind]} out of order",
            got=f"index: {describe(index)}",
            expected=f"index: {expected}, because the row's {kind}s are used in order",
        )


def _text(text: object, place: str, role: Role, row: Row, media: MediaPlaceholders) -> list[Part]:
    checked = row.text(text, place=place)
    if role == "user":
        return media.split(checked)
    return [Text(checked)] if checked else []


OPENAI_TURN_KEYS = MESSAGES_TURN_KEYS
OPENAI_KEYS = frozenset(LIST_KEYS)
_MEDIA_PARTS = {
    "image_url": ("image", "image_url"),
    "input_image": ("image", "image_url"),
    "video_url": ("video", "video_url"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
OPENAI_PART_TYPES = (*_TEXT_PARTS, *_MEDIA_PARTS)


def matches_openai(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the turns could be of this format: no part or key that only `messages` has."""
    if not has_turns_with(values, {"role", "content"}) or MEDIA_KEYS & values.keys():
        return False
    return not part_types(values) & {"image", "video"}


def parse_openai(row: Row) -> Conversation:
    """The conversation of a row of OpenAI messages."""
    turns = [_openai_turn(turn, number, row) for number, turn in enumerate(turns_of(row), 1)]
    # Pictures beside the turns are none of this format's: they are among the unused keys.
    kept = {k: v for k, v in row.values.items() if k not in MEDIA_KEYS and k not in LIST_KEYS}
    return parse_messages(replace(row, values={**kept, "messages": turns}))


def _openai_turn(turn: dict[str, Any], number: int, row: Row) -> dict[str, Any]:
    """The turn as `messages` writes it."""
    rewritten = dict(turn)
    if turn.get("role") == "developer":
        rewritten["role"] = "system"
    if turn.get("tool_calls"):
        raise row.error(f"turn {number} calls tools", expected="turns of texts and pictures")
    content = turn.get("content")
    if isinstance(content, list):
        rewritten["content"] = [
            _openai_part(part, f"turn {number}, part {index}", row)
            for index, part in enumerate(content, start=1)
        ]
    return rewritten


def _openai_part(part: object, place: str, row: Row) -> object:
    if not isinstance(part, dict):
        return part
    given = {key: value for key, value in part.items() if value is not None}
    kind = given.pop("type", None)
    if kind in _TEXT_PARTS:
        return {**given, "type": "text"}
    if kind not in OPENAI_PART_TYPES:
        close = nearest(kind, OPENAI_PART_TYPES) if isinstance(kind, str) else None
        raise row.error(
            f"{place} has no type" if kind is None else f"{place} has an unknown type",
            got=describe(kind) if kind is not None else listed(part) or "no keys",
            expected=" | ".join(OPENAI_PART_TYPES),
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


SHAREGPT_TURN_KEYS = frozenset({"from", "value"}) | WEIGHT_KEYS
SHAREGPT_KEYS = MEDIA_KEYS | {"messages", "conversations"}
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def matches_sharegpt(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row's turns have the keys of this format."""
    return has_turns_with(values, {"from", "value"})


def parse_sharegpt(row: Row) -> Conversation:
    """The conversation of a row whose turns have `from` and `value`."""
    media = media_placeholders(row, always=True)
    if media.given["video"] and not media.given["image"]:
        media.placeholders["<image>"] = "video"
    parsed = [
        _sharegpt_turn(turn, number, row, media)
        for number, turn in enumerate(turns_of(row), start=1)
    ]
    media.check_all_taken()
    return build_conversation(row, parsed)


def _sharegpt_turn(turn: dict[str, Any], number: int, row: Row, media: MediaPlaceholders) -> Turn:
    for key in ("from", "value"):
        if key not in turn:
            raise row.error(
                f"turn {number} has no {key}", got=listed(turn) or "no keys", expected=key
            )
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        close = nearest(speaker, SHAREGPT_ROLES) if isinstance(speaker, str) else None
        raise row.error(
            f"turn {number} has an unknown speaker",
            got=describe(speaker),
            expected=" | ".join(SHAREGPT_ROLES),
            do=f"did you mean {close!r}?" if close else None,
        )
    role = SHAREGPT_ROLES[speaker]
    weight = weight_of(turn, number, role, row)
    value = row.text(turn["value"], place=f"turn {number}")
    if role == "user":
        return Turn(role, tuple(media.split(value)))
    for word, kind in media.placeholders.items():
        # `<video>` is an element of HTML too: in an answer it may stand for itself.
        if word in value and (word == "<image>" or media.given[kind]):
            raise row.error(
                f"turn {number} ({speaker}) contains a {NOUNS[kind]}",
                expected=f"{NOUNS[kind]}s in human turns only",
            )
    parts: tuple[Part, ...] = (Text(value),) if value else ()
    return Turn(role, parts, weight)
