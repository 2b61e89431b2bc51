import numpy as np
import pytest
from nltk.metrics.scores import accuracy, f_measure, precision, recall

from vlmtune.evaluation.metrics import text as yes_no
from vlmtune.evaluation.metrics.base import Answered, Floats
from vlmtune.evaluation.metrics.text import parse_yes_no


def figures_of(samples: list[Answered]) -> dict[str, Floats]:
    entries = [entry.sums for entry in yes_no.yes_no_statistics(samples) if entry is not None]
    return yes_no.yes_no_figures(np.array(entries).sum(axis=0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("Yes, there is a dog in the image.", "yes"),
        ("No, there is no dog.", "no"),
        ("There is not a dog in the image.", "no"),
        ("No. Yes.", "no"),  # the first sentence only
        ("Yes. There is no cat.", "yes"),
        ("Yes, no cat is there", "no"),  # as the script: any "no" is a no
        ("NO!", "no"),
        ("There isn\u2019t one.", "no"),
        ("There is a dog in the image.", None),
        ("nothing", None),  # not the word "not"
        ("yesterday", None),
        ("", None),
    ],
)
def test_an_answer_is_read_from_its_first_sentence(text: str, expected: str | None) -> None:
    assert parse_yes_no(text) == expected


def pope_script(text: str) -> str:
    """The rule of POPE's script, for answers that this module reads as yes or no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def test_answers_that_say_yes_or_no_plainly_are_read_as_by_the_script() -> None:
    texts = ["Yes", "No", "yes.", "no.", "Yes, it is.", "No, it is not.", "There is not.", "Yes no"]
    assert [parse_yes_no(text) for text in texts] == [pope_script(text) for text in texts]
    assert pope_script("A dog.") == "yes" and parse_yes_no("A dog.") is None


def test_figures_by_hand() -> None:
    said = ["yes"] * 5 + ["no"] * 2 + ["dunno"]  # reference yes: 8
    also = ["yes"] * 3 + ["no"] * 7 + ["dunno"] * 2  # reference no: 12
    samples = [Answered(text, "yes") for text in said] + [Answered(text, "No") for text in also]
    figures = figures_of(samples)
    assert figures["yes_no_accuracy"] == pytest.approx(12 / 20)
    assert figures["yes_no_precision"] == pytest.approx(5 / 8)
    assert figures["yes_no_recall"] == pytest.approx(5 / 8)
    assert figures["yes_no_f1"] == pytest.approx(2 * 5 / (2 * 5 + 3 + 3))
    assert figures["yes_fraction"] == pytest.approx(8 / 20)
    assert figures["yes_no_unparsed"] == pytest.approx(3 / 20)
    # With every unreadable answer a "yes", as POPE's script has it, precision would be 6 / 11.
    assert figures["yes_no_precision"] != pytest.approx(6 / 11)


def test_figures_are_nltks() -> None:
    generator = np.random.default_rng(0)
    wanted, given = (generator.choice(["yes", "no"], size=60, p=[0.3, 0.7]) for _ in "ab")
    figures = figures_of([Answered(g, w) for g, w in zip(given, wanted)])
    positive, claimed = set(np.flatnonzero(wanted == "yes")), set(np.flatnonzero(given == "yes"))
    assert figures["yes_no_accuracy"] == pytest.approx(accuracy(list(wanted), list(given)))
    assert figures["yes_no_precision"] == pytest.approx(precision(positive, claimed), abs=1e-12)
    assert figures["yes_no_recall"] == pytest.approx(recall(positive, claimed), abs=1e-12)
    assert figures["yes_no_f1"] == pytest.approx(f_measure(positive, claimed), abs=1e-12)
    assert figures["yes_no_f1"] != pytest.approx(f_measure(positive, claimed, alpha=0.8), abs=1e-6)


def test_only_samples_with_a_yes_or_no_reference_count() -> None:
    samples = [Answered("yes", "red"), Answered("yes", None, ("yes",) * 6 + ("no",) * 4)]
    assert [entry and entry.score for entry in yes_no.yes_no_statistics(samples)] == [None, 1.0]
    assert yes_no.yes_no_statistics([Answered("yes", None, ("yes", "no"))]) == [None]  # undecided


def test_precision_without_a_yes_is_not_defined() -> None:
    assert np.isnan(figures_of([Answered("no", "yes")])["yes_no_precision"])
