"""Alpaca: an instruction, an input that may be empty, and the output; with pictures or without.

    {"instruction": "<image>Name the animal.", "input": "One word.", "output": "Cat",
     "images": ["a.png"]}

The question is the instruction and, on a line of its own, the input. `history` and `system` are as
in query/response. A row with `answers` may leave the output out: it is then for evaluation only.
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

KEYS = MEDIA_KEYS | {"instruction", "input", "output", "history", "system"}


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has an instruction and an output, or answers in its place."""
    return "instruction" in values and ("output" in values or "answers" in values)


def parse(row: Row) -> Conversation:
    """The conversation of a row with `instruction`, `input` and `output`."""
    question = required_text(row, "instruction")
    more = optional_text(row, "input")
    has_output = row.values.get("output") is not None or not row.values.get("answers")
    exchanges = exchanges_of(
        row,
        question=f"{question}\n{more}" if more else question,
        answer=required_text(row, "output") if has_output else None,
    )
    return build_exchanges(
        row,
        exchanges,
        beside=media_beside(row, always=True),
        system=optional_text(row, "system"),
    )
