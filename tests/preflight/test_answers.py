from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.data.types import Conversation, Source, Text, Turn
from vlmtune.preflight.rows import EMPTY_CELL, LEAK, NO_WORDS, leaks, odd_answers


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("a red bus", "The sign says A RED BUS. What does it say?"),
        ("Paris", "This is Paris. Which city is this?"),
        ("Paris.", "This is  paris\nWhich city is this?"),
        ("42 apples", "How many? 42 apples are shown"),
        ("größer", "Ist es größer? Sag es"),
    ],
)
def test_an_answer_that_its_question_gives_away_leaks(answer, question):
    assert leaks(answer, question)


@pytest.mark.parametrize(
    ("answer", "question"),
    [
        ("yes", "Is it red? Answer yes if you see it."),
        ("no", "no idea what this is"),
        ("true", "The bus is red. True or false?"),
        ("blue", "Is the circle red or blue?"),
        ("circle", "Which shape is it: circle, square, triangle"),
        ("circle", "Choose one:\n- square\n- circle\n- triangle\nWhich is it?"),
        ("a bus", "What is it?\nA. a car\nB. a bus\nC. a tram"),
        ("a bus", "What is it? (A) a car (B) a bus"),
        ("cat", "What is a category?"),
        ("Paris", "Which city is this?"),
        ("cat", "This is a cat. What is it?"),
        ("able", "Is this a table?"),
    ],
)
def test_choices_short_words_and_parts_of_words_do_not(answer, question):
    assert not leaks(answer, question)


def conversation(*turns: Turn, options: tuple[str, ...] = ()) -> Conversation:
    return Conversation("one", turns, Source("a.jsonl", 1), options=options)


def ask(text: str) -> Turn:
    return Turn("user", (Text(text),))


def say(text: str, weight: float = 1.0) -> Turn:
    return Turn("assistant", (Text(text),), weight)


def test_each_answer_is_compared_with_the_question_before_it():
    found = odd_answers(
        conversation(
            ask("This is Paris."),
            say("I see."),
            ask("Which city?"),
            say("Paris"),
            ask("In Rome"),
            say("In Rome"),
        )
    )
    assert [kind for kind, _ in found] == [LEAK]
    assert "turn 6" in found[0][1]


def test_options_and_turns_that_are_not_learned_do_not_count():
    turns = (ask("It is Paris, say which"), say("It is Paris"))
    assert odd_answers(conversation(*turns)) != []
    assert odd_answers(conversation(*turns, options=("It is Paris", "It is Rome"))) == []
    assert odd_answers(conversation(turns[0], say("It is Paris", weight=0))) == []


@pytest.mark.parametrize("answer", ["...", "-", "?!", "🙂"])
def test_an_answer_without_a_letter_is_told(answer):
    assert [kind for kind, _ in odd_answers(conversation(ask("What?"), say(answer)))] == [NO_WORDS]


@pytest.mark.parametrize("answer", ["nan", "NaN", "null", "<NA>", "#N/A"])
def test_an_empty_cell_that_became_an_answer_is_told(answer):
    turns = (ask("What?"), say(answer))
    assert [kind for kind, _ in odd_answers(conversation(*turns))] == [EMPTY_CELL]


@pytest.mark.parametrize("answer", ["7", "猫", "ja", "None", "n/a"])
def test_digits_and_any_script_are_words(answer):
    assert odd_answers(conversation(ask("What?"), say(answer))) == []


def test_the_sample_task_does_not_leak(root: Path):
    from vlmtune.data.dataset import load_conversations

    found, _ = load_conversations([root / "data/sample/train.jsonl"])
    assert [odd for c in found for odd in odd_answers(c)] == []
