"""Folders per class: a picture and the name of the folder it is in.

    {"image": "cat/001.png", "label": "cat"}

The question is the entry's `prompt`, the answer the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.exchanges import required_text
from vlmtune.data.formats.pictured import CLASS_PROMPT, asked_of_pictures
from vlmtune.data.formats.rows import Row
from vlmtune.data.text import describe
from vlmtune.data.types import Conversation
from vlmtune.recipe.data_section import DataEntry

KEYS = frozenset({"image", "label"})
_ONLY_TEXTS = (".csv", ".tsv", ".tab", ".tar", ".tar.gz", ".tgz")


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a picture and a label, and no question."""
    return {"image", "label"} <= values.keys() and not {"question", "query"} & values.keys()


def parse(row: Row) -> Conversation:
    """The conversation of a picture and its class."""
    label = row.values.get("label")
    if _is_number(label, row.source.file.lower()):
        raise row.error(
            "the label is a number",
            got=describe(label),
            expected="the name of the class",
            do="give its name; or name the format table, where the number is the answer",
        )
    return asked_of_pictures(
        row,
        row.values.get("image"),
        question=row.entry.prompt or CLASS_PROMPT,
        answer=required_text(row, "label"),
    )


def _is_number(label: object, file: str) -> bool:
    """Whether a label is a number, or a text that is one where all numbers are texts. The names of
    folders and of a data set's classes are names, also 7."""
    if isinstance(label, (int, float)):
        return True
    return isinstance(label, str) and label.strip().isdecimal() and file.endswith(_ONLY_TEXTS)
