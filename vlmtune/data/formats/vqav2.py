"""VQAv2: a question of a picture and ten people's answers, joined from its two files.

    {"question_id": 458752000, "image_id": 458752, "image": "COCO_train2014_000000458752.jpg",
     "question": "What is this photo taken looking through?",
     "multiple_choice_answer": "net", "answers": [{"answer": "net", "answer_id": 1}, …],
     "question_type": "what is this", "answer_type": "other"}

Learned is `multiple_choice_answer`, or else the answer given most often; all are compared with. The
type a sample counts in is `answer_type`, or else `question_type`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmtune.data.formats.exchanges import optional_text, required_text
from vlmtune.data.formats.pictured import answers_of, asked_of_pictures, best_answer
from vlmtune.data.formats.rows import Row
from vlmtune.data.types import Conversation
from vlmtune.recipe.data_section import DataEntry

KEYS = frozenset(
    {"question_id", "image_id", "image", "question", "multiple_choice_answer", "answer_type"}
)


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the row has a question with its number, of a numbered picture or with an agreed
    answer."""
    if not {"question", "question_id"} <= values.keys():
        return False
    return "multiple_choice_answer" in values or {"image_id", "answers"} <= values.keys()


def parse(row: Row) -> Conversation:
    """The conversation of a question of VQAv2."""
    answers = answers_of(row, "answers")
    agreed = optional_text(row, "multiple_choice_answer")
    return asked_of_pictures(
        row,
        row.values.get("image"),
        question=required_text(row, "question"),
        answer=best_answer(row, answers, "answers") if agreed is None else agreed,
        id_key="question_id",
        answers=answers,
        question_type=optional_text(row, "answer_type"),
    )
