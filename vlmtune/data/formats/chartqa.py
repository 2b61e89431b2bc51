"""ChartQA: a question of a chart; the answer is called label.

    {"imgname": "41699051005347.png", "query": "How many bars are there?", "label": "14"}

The picture is `image` where there is one, or else `imgname`; give its folder as `image_dir`.
`label` may be a list: the first is learned, all are compared with. A sample counts in its `type`,
or by `human_or_machine` (0: human, 1: machine).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.exchanges import optional_text, required_text
from vlmtune.data.formats.pictured import answers_of, asked_of_pictures
from vlmtune.data.formats.rows import Row
from vlmtune.data.text import describe
from vlmtune.data.types import Conversation
from vlmtune.recipe.data_section import DataEntry

KEYS = frozenset({"imgname", "image", "query", "label", "type", "human_or_machine"})
WRITERS = ("human", "machine")


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a query, a label and a picture."""
    return {"query", "label"} <= values.keys() and bool({"imgname", "image"} & values.keys())


def parse(row: Row) -> Conversation:
    """The conversation of a question of a chart."""
    labels = answers_of(row, "label")
    if not labels:
        raise row.error("there is no label", got=row.keys, expected="a text or a list of texts")
    image = row.values.get("image")
    return asked_of_pictures(
        row,
        row.values.get("imgname") if image is None else image,
        question=required_text(row, "query"),
        answer=labels[0],
        answers=labels,
        question_type=optional_text(row, "type") or _writer(row),
    )


def _writer(row: Row) -> str | None:
    value = row.values.get("human_or_machine")
    if value is None or value in WRITERS:
        return value
    if isinstance(value, bool) or value not in (0, 1):
        raise row.error(
            "human_or_machine cannot be used", got=describe(value), expected="0 (human) | 1"
        )
    return WRITERS[int(value)]
