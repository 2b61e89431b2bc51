import numpy as np
import pytest

from vlmtune.evaluation.metrics import choice
from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.choice import option_index, option_texts, parse_choice

ANIMALS = ("a cat", "a dog", "a black dog", "a cow")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("B)", "B"),
        ("[B]", "B"),
        ("**B**", "B"),
        (" B\n", "B"),
        ("B. a dog", "B"),
        ("B: it barks", "B"),
        ("B, a dog", "B"),
        ("B\nIt barks.", "B"),
        ("(B) a dog", "B"),
        ("The answer is B", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is (B) a dog.", "B"),
        ("the answer is b", "B"),
        ("Answer: B", "B"),
        ("answer:B", "B"),
        ("Option B", "B"),
        ("It barks, so the answer is B because cats do not.", "B"),
        ("I think it's B.", "B"),
        ("A", "A"),
        ("It's A.", "A"),
        ("A is correct", "A"),
        ("a dog", "B"),
        ("A dog.", "B"),
        ("dog", None),  # of "a dog" and "a black dog" neither is named in full
        ("The answer is a cow", "D"),
        ("It is a black dog, I think", "C"),  # not also "dog"
        ("There is a dog here", "B"),
        ("There is a dogfish here", None),
        ("A big one", None),  # the article
        ("I see nothing", None),
        ("E", None),  # no such option
        ("", None),
        ("A and B", None),
        ("A or B", None),
        ("(A) and (B)", None),
        ("Option A and option B", None),
        ("a cat or a cow", None),
        ("B. a cow", None),  # contradicts itself
        ("(A), not (B)", None),
        ("U.S. flag", None),
    ],
)
def test_the_choice_that_an_answer_names(answer: str, expected: str | None) -> None:
    index = parse_choice(answer, ANIMALS)
    assert index == (None if expected is None else "ABCD".index(expected))


def test_a_letter_inside_an_options_text_is_not_a_choice() -> None:
    options = ("vitamin A", "vitamin C", "iron", "zinc")
    assert parse_choice("It has vitamin C in it", options) == 1
    assert parse_choice("It has C in it", options) == 2


def test_numbers_are_options() -> None:
    assert parse_choice("There are 12 of them", ("1", "2", "12", "-2")) == 2
    assert parse_choice("-2", ("1", "2", "12", "-2")) == 3


def test_options_may_bring_their_letters_along() -> None:
    assert option_texts(("A. Cat", "B. Dog")) == ["cat", "dog"]
    assert option_texts(("B. Cat", "A. Dog")) == ["b. cat", "a. dog"]
    assert parse_choice("dog", ("(A) Cat", "(B) Dog")) == 1


@pytest.mark.parametrize(
    ("reference", "expected"),
    [("B", 1), ("b", 1), ("(B)", 1), ("A dog", 1), ("a  cow.", 3), ("E", None), ("a fox", None)],
)
def test_a_reference_is_a_letter_or_a_text(reference: str, expected: int | None) -> None:
    assert option_index(reference, ANIMALS) == expected


def test_a_reference_that_two_options_have_is_none() -> None:
    assert option_index("yes", ("Yes", "yes", "no")) is None
    assert option_index("B", ("b", "a")) == 0  # where options are letters, the text counts


def test_figures_by_hand() -> None:
    samples = [
        Answered("(B)", "B", options=ANIMALS),
        Answered("a dog", "B", options=ANIMALS),
        Answered("C", "a dog", options=ANIMALS),
        Answered("no idea", "D", options=ANIMALS),
        Answered("a dog", "a dog"),  # no options
        Answered("a dog", "a fox", options=ANIMALS),  # none of them
    ]
    entries = choice.multiple_choice_statistics(samples)
    assert [entry and entry.score for entry in entries] == [1.0, 1.0, 0.0, 0.0, None, None]
    figures = choice.multiple_choice_figures(
        np.sum([entry.sums for entry in entries if entry], axis=0)
    )
    assert figures == {"choice_accuracy": 2 / 4, "choice_unparsed": 1 / 4}


def test_any_right_option_will_do() -> None:
    entries = choice.multiple_choice_statistics(
        [Answered("C", None, ("B", "a black dog"), ANIMALS)]
    )
    assert entries[0] is not None and entries[0].score == 1.0


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("The answer is 1.", 0),
        ("There are 2, I think", 1),
        ("about 3%", 2),
        ("Type-1", 0),
        ("x = 4", 3),
        ("1.5", None),
        ("The answer is -1", None),
        ("-1", None),
        ("x=\u22121", None),
        ("1,000", None),
        ("2:30", None),
        ("1/2", None),
        ("1-2", None),
        ("10", None),
    ],
)
def test_a_number_inside_another_is_not_named(answer: str, named: int | None) -> None:
    assert parse_choice(answer, ("1", "2", "3", "4")) == named
