"""A folder of pictures with a text file for each, or tar members of one name: picture and text.

    {"image": "a.png", "text": "A red ball on the grass."}

The question is the entry's `prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.exchanges import required_text
from vlmtune.data.formats.pictured import CAPTION_PROMPT, asked_of_pictures
from vlmtune.data.formats.rows import Row
from vlmtune.data.types import Conversation
from vlmtune.recipe.data_section import DataEntry

KEYS = frozenset({"image", "text"})


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a picture and a text, and no question."""
    return {"image", "text"} <= values.keys() and "question" not in values


def parse(row: Row) -> Conversation:
    """The conversation of a picture and what is written beside it."""
    return asked_of_pictures(
        row,
        row.values.get("image"),
        question=row.entry.prompt or CAPTION_PROMPT,
        answer=required_text(row, "text").strip(),
    )
