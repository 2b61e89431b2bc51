"""The known formats, and the detection of a file's format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from vlmtune.data.formats import chat, flat, table
from vlmtune.data.formats.base import COMMON_KEYS, MEDIA_KEYS, Row
from vlmtune.data.formats.chat import (
    LIST_KEYS,
    WEIGHT_KEYS,
    ChatFormat,
    has_turns,
    parse_chat,
    unused_turn_keys,
)
from vlmtune.data.sources.base import RawRow, Rows
from vlmtune.data.types import Conversation
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.recipe.data_section import DataEntry, FormatName

NUM_LOOKED_AT = 20
"""Rows from which a file's format is detected."""

_TABLES = (".csv", ".tsv", ".tab", ".parquet", ".arrow", ".feather")
_PROMPTED = ("table", "coco_captions", "image_text", "class_folders")


@dataclass(frozen=True)
class Format:
    """`matches(values, entry)`: whether a row looks like it; `parse` makes it a conversation, or
    raises SampleError; `keys` are those it reads, besides COMMON_KEYS, and `turn_keys` those of
    its turns."""

    matches: Callable[[Mapping[str, Any], DataEntry], bool]
    parse: Callable[[Row], Conversation]
    keys: frozenset[str] | Callable[[Mapping[str, Any], DataEntry], Collection[str]]
    turn_keys: frozenset[str] = frozenset()


def _chat(
    matches: Callable[[Mapping[str, Any], DataEntry], bool],
    form: ChatFormat,
    keys: frozenset[str],
) -> Format:
    turn_keys = frozenset({form.role_key, form.content_key}) | WEIGHT_KEYS
    return Format(matches, partial(parse_chat, form=form), keys, turn_keys)


FORMATS: dict[FormatName, Format] = {
    "messages": _chat(chat.matches_messages, chat.MESSAGES, MEDIA_KEYS | set(LIST_KEYS)),
    "openai": _chat(chat.matches_openai, chat.OPENAI, frozenset(LIST_KEYS)),
    "sharegpt": _chat(chat.matches_sharegpt, chat.SHAREGPT, MEDIA_KEYS | set(LIST_KEYS)),
    "vqav2": Format(flat.matches_vqav2, flat.parse_vqav2, flat.VQAV2_KEYS),
    "docvqa": Format(flat.matches_docvqa, flat.parse_docvqa, flat.DOCVQA_KEYS),
    "chartqa": Format(flat.matches_chartqa, flat.parse_chartqa, flat.CHARTQA_KEYS),
    "query_response": Format(
        flat.matches_query_response, flat.parse_query_response, flat.QUERY_RESPONSE_KEYS
    ),
    "alpaca": Format(flat.matches_alpaca, flat.parse_alpaca, flat.ALPACA_KEYS),
    "coco_captions": Format(
        flat.matches_coco_captions, flat.parse_coco_captions, flat.COCO_CAPTIONS_KEYS
    ),
    "image_text": Format(flat.matches_image_text, flat.parse_image_text, flat.IMAGE_TEXT_KEYS),
    "class_folders": Format(
        flat.matches_class_folders, flat.parse_class_folders, flat.CLASS_FOLDERS_KEYS
    ),
    "table": Format(table.matches, table.parse, table.keys_of),
}
"""If the first rows match several formats equally well, the first of these wins."""


def parse_row(row: Row, name: FormatName) -> Conversation:
    """The row as a conversation. Raises SampleError with the row's place."""
    try:
        return FORMATS[name].parse(row)
    except SampleError as error:
        others = _matching(row.values, row.entry)
        if others and name not in others:
            raise row.error(
                f"the row is in the format {others[0]}, its file in {name}",
                got=row.keys,
                do="split the file, or set its format: data.train: [{path: …, format: …}]",
            ) from error
        raise


def first_rows(rows: Rows) -> list[RawRow]:
    """Those by which a file's format is told."""
    return list(islice(rows.iter_from(0), NUM_LOOKED_AT))


def readable(first: Sequence[RawRow]) -> Iterator[Mapping[str, Any]]:
    """The rows that can be read; bad ones are told elsewhere."""
    for raw in first:
        with suppress(SampleError):
            yield raw.read()


def find_format(first: Sequence[RawRow], entry: DataEntry, *, file: str) -> tuple[FormatName, str]:
    """The format that the recipe names, or that most of the first rows look like, the first in
    FORMATS of several; and how it is logged, with a table's columns as its first row has them.

    Where no row looks like any, it is `table` if the recipe names columns or the file has some, or
    else `messages`: every row then says what it lacks. Raises VlmtuneError where the recipe says
    something of the file that the format does not regard.
    """
    votes: Counter[FormatName] = Counter()
    rows = list(readable(first))
    for values in rows:
        votes.update(_matching(values, entry))
    if entry.format is not None:
        name, found = entry.format, "named"
    elif votes:
        name, found = max(FORMATS, key=lambda name: votes[name]), "detected"
    else:
        is_table = bool(entry.columns) or file.lower().endswith(_TABLES)
        name, found = "table" if is_table else "messages", "the rows match no format"
    check_entry(entry, name, file=file)
    columns = table.columns_of(rows[0], entry) if name == "table" and rows else {}
    roles = (f"{role}: {column}" for role, column in columns.items())
    return name, ", ".join([f"{name} ({found})", *roles])


def unused_keys(values: Mapping[str, Any], entry: DataEntry, name: FormatName) -> set[str]:
    """A row's keys that its format does not read; those of its turns as `messages[].name`."""
    known = FORMATS[name]
    keys = known.keys(values, entry) if callable(known.keys) else known.keys
    unused = values.keys() - COMMON_KEYS - set(keys)
    if known.turn_keys:
        unused |= unused_turn_keys(values, known.turn_keys)
    return unused


def check_entry(entry: DataEntry, name: FormatName, *, file: str) -> None:
    """Raise VlmtuneError where the entry of a file has a key that has no effect on its format."""
    without_effect = {
        "columns": bool(entry.columns) and name != "table",
        "prompt": entry.prompt is not None and name not in _PROMPTED,
        "annotations": entry.annotations is not None and name != "vqav2",
    }
    for key, has_no_effect in without_effect.items():
        if has_no_effect:
            raise VlmtuneError(
                f"`{key}` has no effect in the format {name}",
                file=file,
                got="the format named" if entry.format else "the format detected",
                do=f"take `{key}` away, or name another format with `format:`",
            )


def _matching(values: Mapping[str, Any], entry: DataEntry) -> list[FormatName]:
    """The formats a row looks like. Rows whose columns the recipe names are those of a table."""
    if entry.columns and not has_turns(values):
        return ["table"]
    return [name for name, known in FORMATS.items() if known.matches(values, entry)]
