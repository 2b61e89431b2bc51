"""The formats that are known, and which one the rows of a file are in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmtune.data.formats import messages, sharegpt
from vlmtune.data.formats.rows import COMMON_KEYS, Row
from vlmtune.data.sources.rows import Rows
from vlmtune.data.types import Conversation
from vlmtune.errors import SampleError
from vlmtune.recipe.schema import DataEntry, FormatName

NUM_LOOKED_AT = 20
"""Rows by which a file's format is told."""


@dataclass(frozen=True)
class Format:
    """`matches(values, entry)`: whether a row looks like it; `parse` makes it a conversation, or
    raises SampleError; `keys` are those it reads, besides COMMON_KEYS."""

    matches: Callable[[Mapping[str, Any], DataEntry], bool]
    parse: Callable[[Row], Conversation]
    keys: frozenset[str]


FORMATS: dict[FormatName, Format] = {
    "messages": Format(messages.matches, messages.parse, messages.KEYS),
    "sharegpt": Format(sharegpt.matches, sharegpt.parse, sharegpt.KEYS),
}
"""Where the first rows look like several, the first of them is taken."""

KNOWN_KEYS: dict[FormatName, frozenset[str]] = {
    name: known.keys | COMMON_KEYS for name, known in FORMATS.items()
}


def parse_row(row: Row, name: FormatName) -> Conversation:
    """The row as a conversation. Raises SampleError with the row's place."""
    try:
        return FORMATS[name].parse(row)
    except SampleError as error:
        others = _matching(row.values, row.entry)
        if others and name not in others:
            raise row.error(
                f"the row is in the format {others[0]}, its file in {name}",
                got=f"keys {', '.join(map(str, row.values))}",
                do="split the file; or name its format: data.train: [{path: …, format: …}]",
            ) from error
        raise


def detect_format(rows: Rows, entry: DataEntry) -> FormatName:
    """The format that most of the first rows look like, the first in FORMATS of several.

    Where no row looks like any, it is `messages`: every row then says what it lacks.
    """
    votes: Counter[FormatName] = Counter()
    for index in range(min(NUM_LOOKED_AT, len(rows))):
        try:
            votes.update(_matching(rows.read(index), entry))
        except SampleError:
            continue
    return max(FORMATS, key=lambda name: votes[name])


def _matching(values: Mapping[str, Any], entry: DataEntry) -> list[FormatName]:
    return [name for name, known in FORMATS.items() if known.matches(values, entry)]
