"""COCO captions: a picture and a caption, one row for each annotation; or all captions in one row.

    {"id": 37, "image": "000000000139.jpg", "caption": "A room with a table."}
    {"image": "000000000139.jpg", "captions": ["A room with a table.", "A living room."]}

The question is the entry's `prompt`. Of `captions` the first is learned, and all are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.exchanges import required_text
from vlmtune.data.formats.pictured import CAPTION_PROMPT, answers_of, asked_of_pictures
from vlmtune.data.formats.rows import Row
from vlmtune.data.types import Conversation
from vlmtune.recipe.data_section import DataEntry

KEYS = frozenset({"image", "image_id", "caption", "captions"})


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a picture and captions, or one caption under an annotation's number."""
    if "image" not in values or "question" in values:
        return False
    return "captions" in values or ("caption" in values and isinstance(values.get("id"), int))


def parse(row: Row) -> Conversation:
    """The conversation of a picture and what it shows."""
    # The data set's own captions often end in a space or a line break.
    captions = tuple(caption.strip() for caption in answers_of(row, "captions"))
    if not captions and "captions" in row.values:
        raise row.error("captions is empty", expected="at least one text")
    if captions and row.values.get("caption") is not None:
        raise row.error("both caption and captions are given", expected="one of them")
    return asked_of_pictures(
        row,
        row.values.get("image"),
        question=row.entry.prompt or CAPTION_PROMPT,
        answer=captions[0] if captions else required_text(row, "caption").strip(),
        answers=captions or None,
    )
