"""A row of a table: a picture and its caption or class, or a question, its answer and a picture.

    {"image_path": "a.png", "caption": "A red ball."}
    {"image_path": "a.png", "question": "Which colour is it?", "answer": "red"}

The entry's `columns` say which column has which role. A role that they leave out gets the column
with one of the role's usual names, in any case. The question of a caption or a class is the entry's
`prompt`. A question needs no picture; an answer may be a number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args

from vlmtune.data.formats.base import Row, listed
from vlmtune.data.formats.chat import has_turns
from vlmtune.data.formats.flat import (
    CAPTION_PROMPT,
    CLASS_PROMPT,
    answers_of,
    best_answer,
    image_qa,
)
from vlmtune.data.types import Conversation
from vlmtune.errors import describe, nearest
from vlmtune.recipe.data_section import ColumnRole, DataEntry

USUAL_NAMES: dict[ColumnRole, tuple[str, ...]] = {
    "id": ("id",),
    "image": (
        "image",
        "images",
        "image_path",
        "img",
        "img_path",
        "picture",
        "file_name",
        "filename",
        "image_file",
        "filepath",
        "path",
        "file",
        "image_url",
        "url",
    ),
    "question": ("question", "query", "prompt"),
    "answer": ("answer", "answers", "response"),
    "caption": ("caption", "text", "description"),
    "label": ("label", "class", "category"),
}
ROLES: tuple[ColumnRole, ...] = get_args(ColumnRole)
_FORMS: tuple[tuple[ColumnRole, ...], ...] = (
    ("question", "answer"),
    ("image", "caption"),
    ("image", "label"),
)
"""The roles that a row must have at least; the first of these that it has is what it is."""


def matches(values: Mapping[str, Any], entry: DataEntry) -> bool:
    """Whether the columns make a sample."""
    return not has_turns(values) and _form(columns_of(values, entry)) is not None


def columns_of(values: Mapping[str, Any], entry: DataEntry) -> dict[ColumnRole, str]:
    """The column of each role that the row has and is read by."""
    found = {role: column for role in ROLES if (column := _column(values, entry, role)) is not None}
    form = _form(found)
    used = ("id", "image", *form) if form else ROLES
    return {role: column for role, column in found.items() if role in used}


def keys_of(values: Mapping[str, Any], entry: DataEntry) -> Collection[str]:
    """The columns that are read."""
    return columns_of(values, entry).values()


def parse(row: Row) -> Conversation:
    """The conversation of a row of a table."""
    missing = [name for name in row.entry.columns.values() if name not in row.values]
    if missing:
        names = {column.lower(): column for column in row.values}
        close = names.get(missing[0].lower()) or nearest(missing[0], row.values)
        raise row.error(
            f"there is no column {listed(missing)}",
            got=row.keys,
            expected="the columns that the entry names",
            do=f"did you mean {close!r}?" if close else None,
        )
    columns = columns_of(row.values, row.entry)
    form = _form(columns)
    if form is None:
        is_text = row.source.file.lower().endswith((".csv", ".tsv", ".tab"))
        raise row.error(
            "the columns do not form a sample",
            got=row.keys,
            expected="image and caption, image and label, or question and answer",
            do="name them: columns: {image: …, question: …, answer: …}"
            + (" (the first line of the file is the names of its columns)" if is_text else ""),
        )
    images = row.values.get(columns["image"]) if "image" in columns else None
    id_key = columns.get("id", "id")
    if form == ("question", "answer"):
        _check_answers(row, columns["answer"])
        several = answers_of(row, columns["answer"])
        is_one = isinstance(row.values[columns["answer"]], (str, int, float))
        return image_qa(
            row,
            images,
            question=_question(row, columns["question"]),
            answer=best_answer(row, several, columns["answer"]),
            must_have_picture=False,
            id_key=id_key,
            answers=None if is_one and columns["answer"] != "answers" else several,
        )
    said = columns[form[1]]
    prompt = CAPTION_PROMPT if form[1] == "caption" else CLASS_PROMPT
    return image_qa(
        row,
        images,
        question=row.entry.prompt or prompt,
        answer=row.written(row.values[said], place=said),
        id_key=id_key,
    )


def _question(row: Row, column: str) -> str:
    """The question in `column`, or where there is none the recipe's prompt. Raises SampleError."""
    value = row.values[column]
    if row.entry.prompt is not None and (value is None or value == ""):
        return row.entry.prompt
    question = row.text(value, place=column)
    if not question.strip():
        raise row.error(
            f"{column} is empty",
            expected="a question",
            do="write one, or set the entry's prompt for all such rows",
        )
    return question


def _check_answers(row: Row, column: str) -> None:
    """Raise SampleError if a list of answers is a text, as in CSV: it would be learned."""
    value = row.values[column]
    if column.lower() != "answers" or not isinstance(value, str):
        return
    if value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        raise row.error(
            f"{column} is a list written as a text",
            got=describe(value),
            expected="a list, or one answer",
            do="keep such rows as JSON lines or parquet, where a list is a list; if it is one "
            "answer, call the column answer",
        )


def _column(values: Mapping[str, Any], entry: DataEntry, role: ColumnRole) -> str | None:
    """The column of `role` in the row: the one the recipe names, or one of a usual name."""
    if role in entry.columns:
        return entry.columns[role] if entry.columns[role] in values else None
    taken = set(entry.columns.values())
    by_name: dict[str, str] = {}
    for column in values:
        if column not in taken:
            by_name.setdefault(column.lower(), column)
    return next((by_name[name] for name in USUAL_NAMES[role] if name in by_name), None)


def _form(columns: Mapping[ColumnRole, str]) -> tuple[ColumnRole, ...] | None:
    return next((form for form in _FORMS if all(role in columns for role in form)), None)
