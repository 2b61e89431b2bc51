import pytest

from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.text import exact_match, vqa_accuracy


def test_exact_match_compares_normalized_answers() -> None:
    assert exact_match(Answered("The Red.", answer="red", answers=())) == 1.0
    assert exact_match(Answered("reddish", answer="red", answers=())) == 0.0


def test_exact_match_takes_the_assistants_turn_before_other_answers() -> None:
    assert exact_match(Answered("blue", answer="red", answers=("blue",) * 10)) == 0.0


def test_exact_match_takes_the_consensus_of_the_answers() -> None:
    answers = ("red", "Red", "blue")
    assert exact_match(Answered("red", answer=None, answers=answers)) == 1.0
    assert exact_match(Answered("blue", answer=None, answers=answers)) == 0.0


def test_exact_match_takes_any_of_equally_frequent_answers() -> None:
    assert exact_match(Answered("cab", answer=None, answers=("taxi", "cab"))) == 1.0


def test_an_empty_answer_is_not_the_letter_a() -> None:
    assert exact_match(Answered("", answer="A")) == 0.0
    assert exact_match(Answered("a.", answer="A")) == 1.0


def test_exact_match_needs_a_reference() -> None:
    assert exact_match(Answered("red", answer=None, answers=())) is None


def answers_of(num_red: int) -> tuple[str, ...]:
    return ("red",) * num_red + ("blue",) * (10 - num_red)


@pytest.mark.parametrize(
    ("num_red", "expected"),
    [
        (0, 0.0),
        (1, 0.3),  # 9 subsets with one match: 9 * 1/3, one without: 0
        (2, 0.6),  # 8 * 2/3 + 2 * 1/3 = 6
        (3, 0.9),  # 7 * 1 + 3 * 2/3 = 9
        (4, 1.0),  # 6 * 1 + 4 * 3/3
        (10, 1.0),
    ],
)
def test_vqa_accuracy_is_the_mean_over_ten_leave_one_out_sets(
    num_red: int, expected: float
) -> None:
    score = vqa_accuracy(Answered("Red", answer=None, answers=answers_of(num_red)))
    assert score == pytest.approx(expected, abs=1e-12)
    naive = min(num_red / 3, 1.0)  # without leaving one out
    assert (naive == pytest.approx(expected, abs=1e-12)) == (num_red in (0, 4, 10))


def test_vqa_accuracy_leaves_out_samples_with_too_few_answers() -> None:
    assert vqa_accuracy(Answered("red", answer="red", answers=("red",) * 3)) is None
    assert vqa_accuracy(Answered("red", answer=None, answers=("red",) * 4)) == 1.0
