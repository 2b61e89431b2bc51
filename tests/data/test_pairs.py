"""The two sides of a sample, and the keys by which samples are the same."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from vlmtune.data.pairs import picture_key, picture_side, text_key, text_side
from vlmtune.data.types import Conversation, Image, Source, Text, Turn
from vlmtune.errors import SampleError

PROMPT = "In one word:"


def sample(*images: Image, answer: str = " a red star ", line: int = 3) -> Conversation:
    turns = (Turn("user", (*images, Text("What is it?"))), Turn("assistant", (Text(answer),)))
    return Conversation("x", turns, Source("data.jsonl", line), answers=("star",))


def test_a_side_has_the_pictures_or_the_answer_and_the_prompt_but_not_the_question(tmp_path):
    picture = Image("a.png", tmp_path)
    shown = picture_side(sample(picture), prompt=PROMPT)
    assert shown.turns == (Turn("user", (picture, Text(PROMPT))),)
    said = text_side(sample(picture), prompt=PROMPT)
    assert said.turns == (Turn("user", (Text("a red star\nIn one word:"),)),)
    assert (shown.id, said.source) == ("x", Source("data.jsonl", 3))


def test_a_sample_without_one_side_names_its_place(tmp_path):
    with pytest.raises(SampleError, match="data.jsonl:3: there is no picture"):
        picture_side(sample(), prompt=PROMPT)
    question = Conversation("x", (Turn("user", (Text("?"),)),), Source("data.jsonl", 4))
    with pytest.raises(SampleError, match="data.jsonl:4: there is no answer"):
        text_side(question, prompt=PROMPT)
    with pytest.raises(SampleError, match="data.jsonl:3: no such picture"):
        picture_key(sample(Image("gone.png", tmp_path)))


def test_a_picture_is_known_by_its_content_not_its_name(sample_data: Path, tmp_path: Path):
    content = (sample_data / "images" / "eval-000.png").read_bytes()
    (tmp_path / "copy.png").write_bytes(content)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    keys = {
        picture_key(sample(image))
        for image in (
            Image("images/eval-000.png", sample_data),
            Image("copy.png", tmp_path),
            Image(url, tmp_path),
        )
    }
    assert len(keys) == 1
    other = Image("images/eval-001.png", sample_data)
    assert picture_key(sample(other)) not in keys
    first = Image("copy.png", tmp_path)
    assert picture_key(sample(first, other)) != picture_key(sample(other, first))


def test_a_text_is_known_by_its_words():
    assert text_key(sample(answer="a star")) == text_key(sample(answer=" a star\n"))
    assert text_key(sample(answer="a star")) != text_key(sample(answer="a ring"))
