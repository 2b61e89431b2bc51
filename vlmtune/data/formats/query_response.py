"""A query and its response, with earlier exchanges where there are any.

    {"query": "<image>What is it?", "response": "A cat.", "images": ["a.png"],
     "history": [["Hello.", "Hello!"]], "system": "Be brief."}

Pictures of rows without `<image>` stand in front of the first query. A row with `answers` may
leave the response out: it is then for evaluation only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.beside import MEDIA_KEYS, media_beside
from vlmtune.data.formats.exchanges import (
    build_exchanges,
    exchanges_of,
    optional_text,
    required_text,
)
from vlmtune.data.formats.rows import Row
from vlmtune.data.types import Conversation
from vlmtune.recipe.data_section import DataEntry

KEYS = MEDIA_KEYS | {"query", "response", "history", "system"}


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a query and a response, or answers in its place."""
    return "query" in values and ("response" in values or "answers" in values)


def parse(row: Row) -> Conversation:
    """The conversation of a row with `query` and `response`."""
    has_response = row.values.get("response") is not None or not row.values.get("answers")
    exchanges = exchanges_of(
        row,
        question=required_text(row, "query"),
        answer=required_text(row, "response") if has_response else None,
    )
    return build_exchanges(
        row,
        exchanges,
        beside=media_beside(row, always=True),
        system=optional_text(row, "system"),
    )
