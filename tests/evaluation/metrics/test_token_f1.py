import random

import pytest
from nltk.metrics.scores import f_measure

from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.text import token_f1


@pytest.mark.parametrize(
    ("given", "references", "expected"),
    [
        ("the red cat", ("A red cat!",), 1.0),
        ("red cat", ("red dog",), 0.5),
        ("red", ("red cat on mat",), 0.4),  # precision 1, recall 1/4: 2 / 5
        ("red red", ("red",), 2 / 3),  # counted as often as it occurs
        ("cat", ("dog", "black cat", "cat and dog"), 2 / 3),  # the best
        ("blue", ("red",), 0.0),
        ("the", ("a",), 1.0),  # no word on either side
        ("the", ("red",), 0.0),
        ("U.S.", ("us",), 1.0),
        ("t-shirt", ("tshirt",), 1.0),  # marks go without a trace
        ("theatre", ("atre",), 0.0),  # articles are whole words
    ],
)
def test_token_f1_by_hand(given: str, references: tuple[str, ...], expected: float) -> None:
    assert token_f1(Answered(given, None, references)) == pytest.approx(expected, abs=1e-12)


def occurrences(words: list[str]) -> set[tuple[str, int]]:
    return {(word, words[:number].count(word)) for number, word in enumerate(words)}


def test_token_f1_is_nltks_f_measure_of_the_words() -> None:
    generator = random.Random(0)
    num_repeated = 0
    for _ in range(100):
        given, reference = (
            generator.choices("red cat dog mat".split(), k=generator.randint(1, 5)) for _ in "ab"
        )
        ours = token_f1(Answered(" ".join(given), " ".join(reference)))
        theirs = f_measure(occurrences(reference), occurrences(given)) or 0.0
        assert ours == pytest.approx(theirs, abs=1e-12)
        num_repeated += ours != pytest.approx(f_measure(set(reference), set(given)) or 0.0)
    assert num_repeated > 20  # words as a set give other figures
