"""COCO captions and VQAv2: rows put together from two objects each, joined by id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.sources.base import SpanRows, open_table
from vlmtune.data.sources.json_array import Container, find_keys
from vlmtune.data.sources.json_text import parse_line
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError, describe

_PICTURE_NAMES = {
    "mscoco": "COCO_{subtype}_{image_id:012d}.jpg",
    "abstract_v002": "abstract_v002_{subtype}_{image_id:012d}.png",
}
"""How the pictures of VQAv2 are called, by the `data_type` of the file of questions."""

_ANSWER_KEYS = ("answers", "multiple_choice_answer", "question_type", "answer_type")


def open_coco(container: Container, *, cache_dir: Path) -> SpanRows:
    """A row for each caption. Raises VlmtuneError where two pictures have one id."""

    def build(extra: object) -> list[Any]:
        captions = container.items("annotations")
        images = container.items("images")
        found = find_keys(captions[:, 2], images, file=container.path, name="id")
        return [np.concatenate([captions[:, :2], found], axis=1)]

    files = (container.opened, container.opened)
    table = open_table("coco", files[:1], columns=4, build=build, cache_dir=cache_dir)
    return SpanRows(files, table, _caption_of)


def _caption_of(content: bytes, image_content: bytes | None, source: Source) -> Mapping[str, Any]:
    """The row of an annotation and its picture's entry. Raises SampleError."""
    annotation = parse_line(content, source)
    image_id = annotation.get("image_id")
    image = None if image_content is None else parse_line(image_content, source)
    # Texts are joined by a hash, so that another's entry may have been found.
    if image is None or image.get("id") != image_id:
        raise _missing("the annotation's picture is not in images", source, image_id)
    for name, holder in (("file_name", image), ("caption", annotation)):
        if name not in holder:
            what = "picture" if name == "file_name" else "annotation"
            raise SampleError(
                f"the {what} has no {name}",
                at=source,
                got=f"keys {', '.join(holder)}",
                expected=name,
            )
    row = {"image": image["file_name"], "caption": annotation["caption"]}
    return {"id": annotation["id"], **row} if "id" in annotation else row


def open_vqa(questions: Container, answers: Container, *, cache_dir: Path) -> SpanRows:
    """A row for each question. Raises VlmtuneError where the files are not those of questions and
    of answers, or two answers belong to one question."""
    for container, name in ((questions, "questions"), (answers, "annotations")):
        if name not in container.lists:
            raise VlmtuneError(
                f"the file has no list of {name}",
                file=container.path,
                got=", ".join(container.lists),
                expected="path: the file of the questions, annotations: that of the answers",
            )

    def build(extra: object) -> list[Any]:
        asked = questions.items("questions")
        given = answers.items("annotations")
        found = find_keys(asked[:, 2], given, file=answers.path, name="question_id")
        return [np.concatenate([asked[:, :2], found], axis=1)]

    files = (questions.opened, answers.opened)
    table = open_table("vqa", files, columns=4, build=build, cache_dir=cache_dir)
    subtype = questions.text("data_subtype") or answers.text("data_subtype")
    pattern = _PICTURE_NAMES.get(questions.text("data_type") or "mscoco")
    picture_name = None
    if pattern and subtype:
        picture_name = pattern.replace("{subtype}", re.sub(r"([{}])", r"\1\1", subtype))
    parse = partial(_question_of, answers_path=answers.path, picture_name=picture_name)
    return SpanRows(files, table, parse)


def _question_of(
    content: bytes,
    answers_content: bytes | None,
    source: Source,
    *,
    answers_path: Path,
    picture_name: str | None,
) -> Mapping[str, Any]:
    """The row of a question and its answers. Raises SampleError.

    `picture_name`: how pictures are called, with `{image_id}` in it; None where that is unknown.
    """
    question = parse_line(content, source)
    question_id = question.get("question_id")
    answers = None if answers_content is None else parse_line(answers_content, source)
    if answers is None or answers.get("question_id") != question_id:
        raise _missing(f"no answers in {answers_path}", source, question_id, "question")
    row = {**question, **{key: answers[key] for key in _ANSWER_KEYS if key in answers}}
    if "image" not in row:
        row["image"] = _picture_of(row.get("image_id"), picture_name, source)
    return row


def _picture_of(image_id: object, picture_name: str | None, source: Source) -> str:
    if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id < 0:
        raise SampleError(
            "the question does not name its picture",
            at=source,
            got=f"image_id: {describe(image_id)}",
            expected="a whole number, or the picture's name as image",
        )
    if picture_name is None:
        raise SampleError(
            "the file does not say how the pictures are named",
            at=source,
            expected='"data_type": "mscoco" and "data_subtype" beside the questions, or the '
            "picture's name in each question as image",
        )
    return picture_name.format(image_id=image_id)


def _missing(what: str, source: Source, key: object, of: str = "image") -> SampleError:
    return SampleError(what, at=source, got=f"{of}_id: {describe(key)}", expected="it")
