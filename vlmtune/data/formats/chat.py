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

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

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


@dataclass(frozen=True)
class ChatFormat:
    """How a format writes its turns.

    `roles`: who speaks, under `role_key`. `parts`: by the type of a part, what it is and the key
    that holds it; none: a turn is one text. `media`: what the row lists beside its turns.
    """

    role_key: str
    content_key: str
    roles: Mapping[str, Role]
    parts: Mapping[str, tuple[MediaKind | Literal["text"], str]]
    media: Callable[[Row], MediaPlaceholders]


def _media_of_openai(row: Row) -> MediaPlaceholders:
    """Pictures beside the turns are none of OpenAI's: they are among the unused keys."""
    return MediaPlaceholders(row, {"image": [], "video": []}, {})


def _media_of_sharegpt(row: Row) -> MediaPlaceholders:
    media = media_placeholders(row, always=True)
    if media.given["video"] and not media.given["image"]:
        media.placeholders["<image>"] = "video"
    return media


_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}

MESSAGES = ChatFormat(
    role_key="role",
    content_key="content",
    roles=_ROLES,
    parts={"text": ("text", "text"), "image": ("image", "image"), "video": ("video", "video")},
    media=partial(media_placeholders, always=False),
)
OPENAI = ChatFormat(
    role_key="role",
    content_key="content",
    roles={**_ROLES, "developer": "system"},
    parts={
        "text": ("text", "text"),
        "input_text": ("text", "text"),
        "output_text": ("text", "text"),
        "image_url": ("image", "image_url"),
        "input_image": ("image", "image_url"),
        "video_url": ("video", "video_url"),
    },
    media=_media_of_openai,
)
SHAREGPT = ChatFormat(
    role_key="from",
    content_key="value",
    roles={
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
    },
    parts={},
    media=_media_of_sharegpt,
)


def matches_messages(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row's turns have the keys of this format, and no part that only OpenAI has."""
    only_openai = OPENAI.parts.keys() - MESSAGES.parts.keys()
    return has_turns_with(values, {"role", "content"}) and not part_types(values) & only_openai


def matches_openai(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the turns could be of this format: no part or key that only `messages` has."""
    if not has_turns_with(values, {"role", "content"}) or MEDIA_KEYS & values.keys():
        return False
    return not part_types(values) & {"image", "video"}


def matches_sharegpt(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row's turns have the keys of this format."""
    return has_turns_with(values, {"from", "value"})


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


def _turn_objects(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The turns of a row that are objects, each with the name of its list."""
    for name in LIST_KEYS:
        turns = values.get(name)
        for turn in turns if isinstance(turns, list) else []:
            if isinstance(turn, dict):
                yield name, turn


def part_types(values: Mapping[str, Any]) -> set[str]:
    """The types of all parts in the row's turns."""
    return {
        part["type"]
        for _, turn in _turn_objects(values)
        if isinstance(turn.get("content"), list)
        for part in turn["content"]
        if isinstance(part, dict) and isinstance(part.get("type"), str)
    }


def unused_turn_keys(values: Mapping[str, Any], keys: frozenset[str]) -> set[str]:
    """The keys of the row's turns that are not among `keys`, as `messages[].name`."""
    return {f"{name}[].{key}" for name, turn in _turn_objects(values) for key in turn.keys() - keys}


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


def parse_chat(row: Row, form: ChatFormat) -> Conversation:
    """The conversation of a row that lists its turns. Raises SampleError."""
    media = form.media(row)
    turns = [
        _turn(turn, number, row, media, form) for number, turn in enumerate(turns_of(row), start=1)
    ]
    media.check_all_taken()
    return build_conversation(row, turns)


def _turn(
    turn: dict[str, Any], number: int, row: Row, media: MediaPlaceholders, form: ChatFormat
) -> Turn:
    place = f"turn {number}"
    if form is OPENAI and turn.get("tool_calls"):
        raise row.error(f"{place} calls tools", expected="turns of texts and pictures")
    for key in (form.role_key, form.content_key):
        if key not in turn:
            raise row.error(f"{place} has no {key}", got=listed(turn) or "no keys", expected=key)
    speaker, content = turn[form.role_key], turn[form.content_key]
    if not isinstance(speaker, str) or speaker not in form.roles:
        close = nearest(speaker, form.roles) if isinstance(speaker, str) else None
        raise row.error(
            f"{place} has an unknown {'speaker' if form is SHAREGPT else 'role'}",
            got=describe(speaker),
            expected=" | ".join(form.roles),
            do=f"did you mean {close!r}?" if close else None,
        )
    role = form.roles[speaker]
    weight = weight_of(turn, number, role, row)
    if isinstance(content, list) and form.parts:
        parts: list[Part] = []
        for index, part in enumerate(content, start=1):
            parts += _part(part, f"{place}, part {index}", role, row, media, form)
    else:
        parts = _text(content, place, role, row, media)
        if form is SHAREGPT and role != "user":
            _check_no_placeholder(content, f"{place} ({speaker})", row, media)
    return Turn(role, merge_texts(parts), weight)


def _part(
    part: object, place: str, role: Role, row: Row, media: MediaPlaceholders, form: ChatFormat
) -> list[Part]:
    if not isinstance(part, dict):
        raise row.error(f"{place} is not an object", got=describe(part), expected='{"type": …, …}')
    # Columns of objects fill in every key: what is null is not there.
    given = {key: value for key, value in part.items() if value is not None}
    name = given.pop("type", None)
    if not isinstance(name, str) or name not in form.parts:
        close = nearest(name, form.parts) if isinstance(name, str) else None
        raise row.error(
            f"{place} has no type" if name is None else f"{place} has an unknown type",
            got=listed(part) or "no keys" if name is None else describe(name),
            expected=" | ".join(form.parts),
            do=f"did you mean {close!r}?" if close else None,
        )
    kind, key = form.parts[name]
    value = given.pop(key, None)
    if kind != "text" and form is OPENAI:
        given.pop("detail", None)
    from_list = kind != "text" and value is None and bool(media.given[kind])
    if kind != "text" and from_list:
        _check_index(given.pop("index", None), place, kind, row, media)
    if given:
        raise row.error(
            f"{place} has an unknown key", got=listed(sorted(given)), expected=f"{key} and type"
        )
    if kind == "text":
        return _text(value, place, role, row, media)
    if from_list:
        return [media.take(kind)]
    if form is OPENAI and isinstance(value, dict):
        value = _url_of(value, key, place, row)
    return [picture(value, row) if kind == "image" else video(value, row)]


def _url_of(value: dict[str, Any], key: str, place: str, row: Row) -> object:
    if value.keys() - {"url", "detail"}:
        raise row.error(
            f"{place} has an unknown key in {key}", got=listed(value), expected="url and detail"
        )
    return value.get("url")


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


def _check_no_placeholder(text: str, place: str, row: Row, media: MediaPlaceholders) -> None:
    for word, kind in media.placeholders.items():
        # `<video>` is an element of HTML too: in an answer it may stand for itself.
        if word in text and (word == "<image>" or media.given[kind]):
            raise row.error(
                f"{place} contains a {NOUNS[kind]}", expected=f"{NOUNS[kind]}s in human turns only"
            )
