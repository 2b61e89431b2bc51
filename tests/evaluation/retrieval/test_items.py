"""What is one picture, what is one text, and which belong together."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from vlmtune.data.types import Conversation, Image, Source, Text, Turn
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError
from vlmtune.evaluation.retrieval.ranking import retrieval_items


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {"a": b"first", "b": b"second", "copy-of-a": b"first"}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    return tmp_path


def row(
    line: int, folder: Path, picture: str | None, answer: str | None, *answers: str
) -> Conversation:
    images = () if picture is None else (Image(picture, folder),)
    turns = [Turn("user", (*images, Text("Describe it.")))]
    if answer is not None:
        turns.append(Turn("assistant", (Text(answer),)))
    return Conversation(str(line), tuple(turns), Source("d.jsonl", line), answers)


def test_a_picture_in_several_rows_is_one_picture_with_several_captions(folder: Path) -> None:
    inline = "data:image/png;base64," + base64.b64encode(b"second").decode()
    items = retrieval_items(
        [
            row(1, folder, "a.png", "red"),
            row(2, folder, "b.png", "blue"),
            row(3, folder, "copy-of-a.png", "crimson"),
            row(4, folder, inline, "azure"),
        ]
    )
    assert [picture.id for picture in items.pictures] == ["1", "2"]
    assert [text.text for text in items.texts] == ["red", "blue", "crimson", "azure"]
    assert items.relevance.texts_of == ((0, 2), (1, 3))
    assert items.relevance.pictures_of == ((0,), (1,), (0,), (1,))


def test_a_text_under_two_pictures_is_one_text_that_is_right_for_both(folder: Path) -> None:
    items = retrieval_items([row(1, folder, "a.png", "red "), row(2, folder, "b.png", "red")])
    assert [text.text for text in items.texts] == ["red"]
    assert items.relevance.texts_of == ((0,), (0,))
    assert items.relevance.pictures_of == ((0, 1),)


def test_a_rows_answers_are_captions_too(folder: Path) -> None:
    items = retrieval_items(
        [row(1, folder, "a.png", "red", "red", "crimson"), row(2, folder, "b.png", None, "blue")]
    )
    assert [(text.text, text.number) for text in items.texts] == [
        ("red", 0),
        ("crimson", 1),
        ("blue", 0),
    ]
    assert [text.conversation.turns[-1].text for text in items.texts] == ["red", "crimson", "blue"]
    assert [text.conversation.source.line for text in items.texts] == [1, 1, 2]


def test_rows_that_cannot_be_used_are_errors_with_their_lines(folder: Path) -> None:
    with pytest.raises(SampleError, match=r"d\.jsonl:1: row has no picture"):
        retrieval_items([row(1, folder, None, "red"), row(2, folder, "b.png", "blue")])
    with pytest.raises(
        ErrorGroup, match=r"(?s)d\.jsonl:1: row has no text.*d\.jsonl:2: no such picture"
    ):
        retrieval_items([row(1, folder, "a.png", None), row(2, folder, "none.png", "blue")])
    with pytest.raises(VlmtuneError, match="no rows"):
        retrieval_items([])
