from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from vlmtune.data.encode import Encoder
from vlmtune.data.media import open_image
from vlmtune.data.types import Conversation, Image, Source, Text, Turn
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.guard import blanked, majority_answers


def exchange(*texts: str, answers: tuple[str, ...] = ()) -> Conversation:
    turns = [
        Turn("user" if number % 2 == 0 else "assistant", (Text(text),))
        for number, text in enumerate(texts)
    ]
    return Conversation("0", tuple(turns), Source("d.jsonl", 1), answers)


def test_a_question_gets_its_most_frequent_answer_in_training() -> None:
    training = [
        exchange("What color?", "red"),
        exchange("What color?", "blue"),
        exchange("What color?", "blue"),
        exchange("Round?", "yes", "Sure?", "no"),
        exchange("Round?", "yes"),
        exchange("Round?", "yes"),
        exchange("How many?", answers=("2", "3", "3")),
    ]
    asked = [exchange(text) for text in ("What color?", "Round?", "Sure?", "How many?", "Why?")]
    # "yes" is the most frequent of all nine answers.
    assert majority_answers(training, asked) == ["blue", "yes", "no", "3", "yes"]


def test_on_easy_vqa_two_thirds_are_guessed_right() -> None:
    easy_vqa = pytest.importorskip("easy_vqa")
    training = [
        exchange(question, answer) for question, answer, _ in zip(*easy_vqa.get_train_questions())
    ]
    questions, answers, _ = easy_vqa.get_test_questions()
    guesses = majority_answers(training, [exchange(question) for question in questions])
    right = sum(guess == answer for guess, answer in zip(guesses, answers))
    assert round(right / len(answers), 3) == 0.670


def test_without_an_answer_to_guess_from_there_is_an_error() -> None:
    with pytest.raises(VlmtuneError, match="no answer to guess from"):
        majority_answers([exchange("What?")], [exchange("What?")])


def test_a_blank_picture_is_grey_and_as_large_as_the_model_sees_the_other(
    tmp_path: Path, encoder: Encoder
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    PIL.Image.new("RGB", (80, 48), "red").save(tmp_path / "a.jpg", exif=exif)
    turns = (Turn("user", (Image("a.jpg", tmp_path), Text("What?"))),)
    seen = Conversation("0", turns, Source("d.jsonl", 1))
    blind = blanked(seen)
    picture = open_image(blind.images[0], max_pixels=10**6)
    assert picture.size == (48, 80)
    assert picture.getcolors() == [(48 * 80, (128, 128, 128))]
    assert blind.turns[0].text == "What?"
    assert encoder.encode_prompt(blind).num_tokens == encoder.encode_prompt(seen).num_tokens
