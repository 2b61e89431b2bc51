"""DocVQA: a question of a page, and the answers that are right.

    {"questionId": 337, "question": "What is the date?", "image": "documents/xnbl0037_1.png",
     "docId": 279, "ucsf_document_id": "xnbl0037", "ucsf_document_page_no": "1",
     "answers": ["1/8/93"], "question_types": ["handwritten", "form"]}

Learned is the answer given most often; all are compared with. A row without `image` is of the
picture `documents/<ucsf_document_id>_<ucsf_document_page_no>.png`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.exchanges import required_text
from vlmtune.data.formats.pictured import answers_of, asked_of_pictures, best_answer
from vlmtune.data.formats.rows import Row
from vlmtune.data.types import Conversation
from vlmtune.recipe.data_section import DataEntry

OWN_KEYS = frozenset({"questionId", "docId", "ucsf_document_id", "ucsf_document_page_no"})
KEYS = OWN_KEYS | {"question", "image", "question_types", "data_split"}


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a question and one of this data set's own keys."""
    return "question" in values and bool(OWN_KEYS & values.keys())


def parse(row: Row) -> Conversation:
    """The conversation of a question of a page."""
    answers = answers_of(row, "answers")
    kinds = row.texts(row.values.get("question_types"), place="question_types")
    return asked_of_pictures(
        row,
        _page(row),
        question=required_text(row, "question"),
        answer=best_answer(row, answers, "answers"),
        id_key="questionId",
        answers=answers,
        question_type=", ".join(kinds) or None,
    )


def _page(row: Row) -> object:
    """The picture, or the name it has in the data set's own folder."""
    if row.values.get("image") is not None:
        return row.values["image"]
    names = [row.values.get(key) for key in ("ucsf_document_id", "ucsf_document_page_no")]
    if None in names:
        return None
    document, page = (row.written(name, place="the name of the page") for name in names)
    return f"documents/{document}_{page}.png"
