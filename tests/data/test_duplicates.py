"""Digests of samples, and what they say about one set and about two."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from vlmtune.data.tools.duplicates import (
    DigestTable,
    PictureDigests,
    duplicates,
    overlap,
    question_digest,
    sample_digests,
)
from vlmtune.data.types import Conversation, Image, Source, Text, Turn, Video
from vlmtune.errors import SampleError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("red", "blue", "green"):
        PIL.Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    (tmp_path / "copy-of-red.png").write_bytes((tmp_path / "red.png").read_bytes())
    return tmp_path


def ask(folder: Path, question: str, *pictures: str, answer: str = "yes") -> Conversation:
    parts = (*(Image(name, folder) for name in pictures), Text(question))
    turns = (Turn("user", parts), Turn("assistant", (Text(answer),)))
    return Conversation("one", turns, Source("data.jsonl", 3))


def table(*conversations: Conversation):
    known, found = PictureDigests(), DigestTable()
    for conversation in conversations:
        found.add(sample_digests(conversation, known))
    return found


def test_pictures_are_told_by_content_not_by_name(folder: Path):
    known = PictureDigests()
    (red,) = known.of(Image("red.png", folder))
    content = (folder / "red.png").read_bytes()
    assert known.of(Image("copy-of-red.png", folder)) == (red,)
    assert known.of(Image("any name", folder, content=content)) == (red,)
    assert known.of(Image("blue.png", folder)) != (red,)


def test_a_file_that_changed_has_another_digest(folder: Path):
    known = PictureDigests()
    before = known.of(Image("red.png", folder))
    (folder / "red.png").write_bytes((folder / "blue.png").read_bytes())
    os.utime(folder / "red.png", ns=(1, 1))
    assert known.of(Image("red.png", folder)) != before
    assert known.of(Image("red.png", folder)) == known.of(Image("blue.png", folder))


def test_a_video_of_frames_has_a_digest_for_each(folder: Path):
    known = PictureDigests()
    frames = known.of(Video(("red.png", "blue.png"), folder))
    assert frames == known.of(Image("red.png", folder)) + known.of(Image("blue.png", folder))


def test_questions_are_compared_by_words(folder: Path):
    question = question_digest(ask(folder, "What is  it?\n"))
    assert question_digest(ask(folder, "what is it?")) == question
    assert question_digest(ask(folder, "What is it?", answer="no")) == question
    assert question_digest(ask(folder, "What was it?")) != question


def test_a_sample_is_repeated_only_with_answer_and_pictures(folder: Path):
    first = ask(folder, "What?", "red.png")
    found = duplicates(
        table(
            first,
            ask(folder, "What?", "blue.png"),
            ask(folder, "What?", "red.png", answer="no"),
            ask(folder, "What?", "copy-of-red.png"),
            first,
        )
    )
    assert found.num_repeated == 2
    assert found.examples == ((0, 3), (0, 4))
    assert (found.num_pictures, found.num_picture_uses) == (2, 5)


def test_the_place_of_a_picture_counts(folder: Path):
    red = Image("red.png", folder)
    before = ask(folder, "x")
    one = replace(before, turns=(Turn("user", (red, Text("x"))), before.turns[1]))
    other = replace(before, turns=(Turn("user", (Text("x"), red)), before.turns[1]))
    assert duplicates(table(one, other)).num_repeated == 0
    assert duplicates(table(one, one)).num_repeated == 1


def test_overlap_counts_pictures_questions_and_both(folder: Path):
    train = table(
        ask(folder, "What?", "red.png"), ask(folder, "Where?", "blue.png"), ask(folder, "Hi")
    )
    evaluation = table(
        ask(folder, "Who?", "green.png"),
        ask(folder, "Where?", "copy-of-red.png", "red.png"),
        ask(folder, "what?", "copy-of-red.png", answer="no"),
        ask(folder, "hi", answer="hello"),
    )
    found = overlap(train, evaluation)
    assert found.num_pictures == 1
    assert found.num_with_picture == 2
    assert found.num_with_question == 3
    assert found.num_with_both == 2
    assert found.examples == (2, 3)


def test_sets_with_nothing_in_common(folder: Path):
    train = table(ask(folder, "What?", "red.png"))
    found = overlap(train, table(ask(folder, "Where?", "blue.png")))
    assert (found.num_pictures, found.num_with_picture, found.num_with_question) == (0, 0, 0)
    assert found.examples == ()
    assert overlap(table(), table()).num_with_both == 0
    assert duplicates(table()).num_repeated == 0


def test_a_missing_picture_is_named_with_its_sample(folder: Path):
    with pytest.raises(SampleError) as caught:
        sample_digests(ask(folder, "What?", "gone.png"), PictureDigests())
    assert (caught.value.file, caught.value.line) == ("data.jsonl", 3)
    assert "gone.png" in str(caught.value)


def test_the_memory_of_pictures_pickles(folder: Path):
    known = PictureDigests()
    red = known.of(Image("red.png", folder))
    assert pickle.loads(pickle.dumps(known)).of(Image("red.png", folder)) == red
