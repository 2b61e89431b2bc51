import random

import pytest
from anls import anls_score

from vlmtune.evaluation.metrics.base import Answered
from vlmtune.evaluation.metrics.text import anls


@pytest.mark.parametrize(
    ("given", "references", "expected"),
    [
        ("hello", ("hello",), 1.0),
        ("hallo", ("hello",), 0.8),  # 1 edit of 5
        ("Hello  World", ("hello world",), 1.0),
        ("cat", ("cart",), 0.75),  # 1 of the longer, 4
        ("abc", ("xyz",), 0.0),
        ("3.14", ("3.99",), 0.5),  # exactly half: the script's rule, not the paper's
        ("abcdefg", ("abcxxxx",), 0.0),  # 4 of 7: below half
        ("12", ("90", "13", "127"), 2 / 3),  # 0, 0.5, 2/3: the best
        ("", ("",), 1.0),
        ("", ("x",), 0.0),
    ],
)
def test_anls_by_hand(given: str, references: tuple[str, ...], expected: float) -> None:
    assert anls(Answered(given, None, references)) == pytest.approx(expected, abs=1e-12)


def test_anls_is_the_anls_packages_but_for_exact_halves() -> None:
    generator = random.Random(0)
    num_halves = num_between = 0
    for _ in range(300):
        reference = "".join(generator.choices("ab1 ", k=generator.randint(1, 8))).strip() or "a"
        given = list(reference)
        for _ in range(generator.randint(0, 4)):
            given[generator.randrange(len(given))] = generator.choice("ab1X")
        texts = ("".join(given), [reference, "zzzzzzzz"])
        ours, theirs = anls(Answered(texts[0], None, tuple(texts[1]))), anls_score(*texts)
        num_halves += ours == 0.5
        num_between += 0.5 < theirs < 1
        # The package is strict at the threshold, as the paper is.
        assert theirs == (0.0 if ours == 0.5 else pytest.approx(ours, abs=1e-12))
    assert num_halves > 10 and num_between > 30
