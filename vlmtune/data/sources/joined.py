"""COCO captions and VQAv2: rows put together from two objects each, joined by id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.sources.base import (
    Stamp,
    open_table,
    read_span,
)
from vlmtune.data.sources.json_array import Container, find_keys
from vlmtune.data.sources.json_text import parse_line
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError, describe
from vlmtune.files import Table

_PICTURE_NAMES = {
    "mscoco": "COCO_{subtype}_{image_id:012d}.jpg",
    "abstract_v002": "abstract_v002_{subtype}_{image_id:012d}.png",
}
"""How the pictures of VQAv2 are called, by the `data_type` of the file of questions."""

_ANSWER_KEYS = ("answers", "multiple_choice_answer", "question_type", "answer_type")


@dataclass(frozen=True)
class CocoRows:
    """A row for each caption; `table` has the start and end of it and of its picture's entry."""

    path: Path
    stamp: Stamp
    table: Table

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return len(self.table)

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def read(self, index: int) -> Mapping[str, Any]:
        source = self.place(index)
        start, end, image_start, image_end = self.table.row(index)
        annotation = parse_line(read_span(self.path, self.stamp, start, end), source)
        image_id = annotation.get("image_id")
        if image_start < 0:
            raise _missing("the annotation's picture is not in images", source, image_id)
        image = parse_line(read_span(self.path, self.stamp, image_start, image_end), source)
        if image.get("id") != image_id:
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


@dataclass(frozen=True)
class VqaRows:
    """A row for each question; `table` has the start and end of it and of its answers.

    `picture_name`: how pictures are called, with `{image_id}` in it; None where that is unknown.
    """

    path: Path
    stamp: Stamp
    answers_path: Path
    answers_stamp: Stamp
    table: Table
    picture_name: str | None

    @property
    def file(self) -> str:
        return str(self.path)

    @property
    def base_dir(self) -> Path:
        return self.path.parent

    def __len__(self) -> int:
        return len(self.table)

    def place(self, index: int) -> Source:
        return Source(self.file, index + 1)

    def read(self, index: int) -> Mapping[str, Any]:
        source = self.place(index)
        start, end, answers_start, answers_end = self.table.row(index)
        question = parse_line(read_span(self.path, self.stamp, start, end), source)
        question_id = question.get("question_id")
        if answers_start < 0:
            raise _missing(f"no answers in {self.answers_path}", source, question_id, "question")
        span = read_span(self.answers_path, self.answers_stamp, answers_start, answers_end)
        answers = parse_line(span, source)
        if answers.get("question_id") != question_id:
            raise _missing(f"no answers in {self.answers_path}", source, question_id, "question")
        row = {**question, **{key: answers[key] for key in _ANSWER_KEYS if key in answers}}
        if "image" not in row:
            row["image"] = self._picture(row.get("image_id"), source)
        return row

    def _picture(self, image_id: object, source: Source) -> str:
        if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id < 0:
            raise SampleError(
                "the question does not name its picture",
                at=source,
                got=f"image_id: {describe(image_id)}",
                expected="a whole number, or the picture's name as image",
            )
        if self.picture_name is None:
            raise SampleError(
                "the file does not say how the pictures are named",
                at=source,
                expected='"data_type": "mscoco" and "data_subtype" beside the questions, or the '
                "picture's name in each question as image",
            )
        return self.picture_name.format(image_id=image_id)


def open_coco(container: Container, *, cache_dir: Path) -> CocoRows:
    """Raises VlmtuneError where two pictures have one id."""
    path, stamp = container.path, container.stamp

    def build(extra: object) -> list[Any]:
        captions = container.items("annotations")
        found = find_keys(captions[:, 2], container.items("images"), file=path, name="id")
        return [np.concatenate([captions[:, :2], found], axis=1)]

    table = open_table("coco", [(path, stamp)], columns=4, build=build, cache_dir=cache_dir)
    return CocoRows(path, stamp, table)


def open_vqa(questions: Container, answers: Container, *, cache_dir: Path) -> VqaRows:
    """Raises VlmtuneError where the files are not those of questions and of answers, or two
    answers belong to one question."""
    for container, name in ((questions, "questions"), (answers, "annotations")):
        if name not in container.lists:
            raise VlmtuneError(
                f"the file has no list of {name}",
                file=container.path,
                got=", ".join(container.lists),
                expected="path: the file of the questions, annotations: that of the answers",
            )
    files = [(container.path, container.stamp) for container in (questions, answers)]

    def build(extra: object) -> list[Any]:
        asked = questions.items("questions")
        given = answers.items("annotations")
        found = find_keys(asked[:, 2], given, file=answers.path, name="question_id")
        return [np.concatenate([asked[:, :2], found], axis=1)]

    table = open_table("vqa", files, columns=4, build=build, cache_dir=cache_dir)
    subtype = questions.text("data_subtype") or answers.text("data_subtype")
    pattern = _PICTURE_NAMES.get(questions.text("data_type") or "mscoco")
    picture_name = None
    if pattern and subtype:
        picture_name = pattern.replace("{subtype}", re.sub(r"([{}])", r"\1\1", subtype))
    return VqaRows(*files[0], *files[1], table, picture_name)


def _missing(what: str, source: Source, key: object, of: str = "image") -> SampleError:
    return SampleError(what, at=source, got=f"{of}_id: {describe(key)}", expected="it")
