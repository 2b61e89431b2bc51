import numpy as np
import pytest
from nltk.metrics.scores import accuracy, f_measure

from vlmtune.evaluation.metrics import choice
from vlmtune.evaluation.metrics.base import Answered, Floats

WANTED = ["cat", "cat", "cat", "dog", "dog", "bird"]
GIVEN = ["Cat.", "a cat", "dog", "dog", "a fox", "bird"]


def figures_of(wanted: list[str], given: list[str]) -> dict[str, Floats]:
    entries = choice.classification_statistics([Answered(g, w) for g, w in zip(given, wanted)])
    return choice.classification_figures(np.sum([entry.sums for entry in entries if entry], axis=0))


def test_figures_by_hand() -> None:
    figures = figures_of(WANTED, GIVEN)
    # cat 2 right of 2 given, 3 wanted: 4/5; dog 1 of 2 and 2: 2/4; bird 1 of 1 and 1: 1
    assert figures["macro_f1"] == pytest.approx((4 / 5 + 2 / 4 + 1) / 3, abs=1e-12)
    assert figures["class_accuracy"] == pytest.approx(4 / 6)
    assert figures["class_unparsed"] == pytest.approx(1 / 6)
    # Other things called macro-F1: F1 of the mean precision and recall, and with "fox" as a class.
    precision, recall = (1 + 1 / 2 + 1) / 3, (2 / 3 + 1 / 2 + 1) / 3
    assert figures["macro_f1"] != pytest.approx(2 * precision * recall / (precision + recall))
    assert figures["macro_f1"] != pytest.approx((4 / 5 + 2 / 4 + 1 + 0) / 4)


def random_classes() -> tuple[list[str], list[str]]:
    generator = np.random.default_rng(0)
    names = np.array(["red", "green", "blue", "gray", "pink"])
    wanted = generator.choice(names[:4], size=60, p=[0.5, 0.3, 0.15, 0.05])
    given = np.where(generator.random(60) < 0.6, wanted, generator.choice(names, size=60))
    return wanted.tolist(), given.tolist()


def test_figures_are_nltks() -> None:
    wanted, given = random_classes()
    figures = figures_of(wanted, given)
    f1 = [
        f_measure(
            {row for row, name in enumerate(wanted) if name == of},
            {row for row, name in enumerate(given) if name == of},
        )
        for of in sorted(set(wanted))
    ]
    assert figures["macro_f1"] == pytest.approx(np.mean([value or 0.0 for value in f1]), abs=1e-12)
    assert figures["class_accuracy"] == pytest.approx(accuracy(wanted, given), abs=1e-12)
    assert figures["class_unparsed"] == pytest.approx(given.count("pink") / 60, abs=1e-12)


def test_figures_are_scikit_learns() -> None:
    # scikit-learn 1.9.1: f1_score(wanted, given, labels=sorted(set(wanted)), average="macro"),
    # and with average="weighted", which is another figure.
    figures = figures_of(*random_classes())
    assert figures["macro_f1"] == pytest.approx(0.43862762496302865, abs=1e-12)
    assert figures["macro_f1"] != pytest.approx(0.5955831608005521, abs=1e-3)


def test_the_mean_is_over_the_classes_at_hand() -> None:
    # A slice without a bird: its F1 is not averaged, not even as 0.
    entries = choice.classification_statistics([Answered(g, w) for g, w in zip(GIVEN, WANTED)])
    sums = np.sum([entry.sums for entry in entries[:5] if entry], axis=0)
    assert choice.classification_figures(sums)["macro_f1"] == pytest.approx((4 / 5 + 2 / 4) / 2)


def test_an_undecided_reference_does_not_count() -> None:
    entries = choice.classification_statistics(
        [Answered("cat", None, ("cat", "dog")), Answered("cat", None, ("cat", "cat", "dog"))]
    )
    assert [entry and entry.score for entry in entries] == [None, 1.0]


def test_classes_of_letters_and_marks_are_kept_apart() -> None:
    assert figures_of(["A", "+", "-"], ["A", "-", "-"])["class_accuracy"] == pytest.approx(2 / 3)
