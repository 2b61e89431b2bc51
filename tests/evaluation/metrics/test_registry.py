import numpy as np
import pytest

from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.metrics.base import Answered, Floats
from vlmtune.evaluation.metrics.registry import METRICS, TASKS, is_fraction, metrics_for

# Every metric applies to some of them, and each half has all classes (yes, no, B, …).
SAMPLES = [
    Answered("Yes.", "yes"),
    Answered("B", "B", options=("cat", "dog")),
    Answered("[0, 0, 10, 10]", "[0, 0, 10, 8]"),
    Answered("a red cat on a mat", None, ("a red cat sits on a mat", "cat", "cat", "a cat")),
    Answered("42", "41"),
    Answered("no", "no"),
    Answered("maybe", "yes"),
    Answered("the dog", "B", options=("cat", "dog")),
    Answered("no box", "[0, 0, 10, 8]"),
    Answered("a dog", None, ("a red cat sits on a mat", "cat", "cat", "a cat")),
    Answered("", "41"),
    Answered("no", "no"),
]


def summed(name: str, samples: list[Answered]) -> Floats:
    entries = METRICS[name].statistics(samples)
    return np.array([entry.sums for entry in entries if entry is not None]).sum(axis=0)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(VlmtuneError, match="did you mean 'vqa'"):
        metrics_for("vqaa")
    assert list(metrics_for("vqa")) == list(TASKS["vqa"])
    with pytest.raises(VlmtuneError, match="did you mean 'exact_match'"):
        metrics_for("vqa", ["exactmatch"])
    assert list(metrics_for("vqa", ["vqa_accuracy"])) == ["vqa_accuracy"]


def test_every_metric_of_a_task_is_there() -> None:
    assert {name for names in TASKS.values() for name in names} <= METRICS.keys()


@pytest.mark.parametrize("name", METRICS)
def test_statistics_of_two_halves_add_up_to_the_whole(name: str) -> None:
    whole, first, second = (
        summed(name, samples) for samples in (SAMPLES, SAMPLES[:6], SAMPLES[6:])
    )
    if name == "cider":  # document frequencies are of the set at hand
        assert not np.allclose(first + second, whole, rtol=1e-3)
        whole = np.array([entry.sums for entry in METRICS[name].statistics(SAMPLES) if entry])
        first, second, whole = whole[:6].sum(axis=0), whole[6:].sum(axis=0), whole.sum(axis=0)
    np.testing.assert_allclose(first + second, whole, rtol=1e-12)
    halves = METRICS[name].figures(np.stack([first, second]))
    for figure, value in METRICS[name].figures(whole).items():
        assert halves[figure].shape == (2,)  # as a bootstrap asks: many sums at once
        alone = METRICS[name].figures(first)[figure]
        np.testing.assert_allclose(halves[figure][0], alone, rtol=1e-12)
        assert np.ndim(value) == 0


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_takes_no_samples_and_samples_it_does_not_apply_to(name: str) -> None:
    assert METRICS[name].statistics([]) == []
    assert METRICS[name].statistics([Answered("red", None)]) == [None]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_takes_an_empty_prediction(name: str) -> None:
    samples = [Answered("", sample.answer, sample.answers, sample.options) for sample in SAMPLES]
    sums = summed(name, samples)
    assert np.isfinite(sums).all()
    for figure, value in METRICS[name].figures(sums).items():
        expected = 1.0 if figure.endswith("unparsed") else 0.0
        if figure == "yes_no_precision":
            assert np.isnan(value)  # no "yes" was said
        elif figure.startswith("yes_no") or figure in ("class_accuracy", "cider"):
            assert value == expected
        assert not value > 1.0


def test_figures_have_names_of_their_own_in_snake_case() -> None:
    names = [figure for name in METRICS for figure in METRICS[name].figures(summed(name, SAMPLES))]
    assert len(names) == len(set(names)) == 25
    assert all(name.replace("_", "").isalnum() and name == name.lower() for name in names)


def test_only_figures_between_0_and_1_are_shown_in_percent() -> None:
    for name in METRICS:
        for figure in METRICS[name].figures(summed(name, SAMPLES)):
            assert is_fraction(figure) == (figure != "cider")
    assert not is_fraction("text_to_picture_median_rank")
    assert not is_fraction("eval_loss")
