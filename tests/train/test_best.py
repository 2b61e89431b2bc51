"""Which evaluation was the best, and when waiting for a better one ends."""

from __future__ import annotations

import math

import pytest

from vlmtune.errors import VlmtuneError
from vlmtune.train.checkpoint import Best, is_better, is_over, updated


@pytest.mark.parametrize(
    ("metric", "value", "than", "expected"),
    [
        ("exact_match", 0.5, 0.4, True),
        ("exact_match", 0.4, 0.4, False),
        ("loss", 0.4, 0.5, True),
        ("loss", 0.5, 0.4, False),
        ("text_to_picture_median_rank", 2.0, 3.0, True),
        ("exact_match", math.nan, 0.1, False),
        ("exact_match", 0.1, math.nan, True),
    ],
)
def test_better_is_higher_but_for_losses_and_ranks(metric, value, than, expected):
    assert is_better(metric, value, than) is expected


def best_of(values: list[float], metric: str = "exact_match") -> Best | None:
    best = None
    for number, value in enumerate(values, start=1):
        best = updated(best, metric=metric, step=10 * number, values={metric: value})
    return best


def test_the_first_of_equal_values_is_kept():
    assert best_of([0.2, 0.5, 0.5, 0.4]) == Best("exact_match", 20, 0.5, num_since=2)


def test_patience_counts_evaluations_in_a_row():
    assert not is_over(best_of([0.5, 0.4, 0.6, 0.5]), 2)
    assert is_over(best_of([0.5, 0.4, 0.6, 0.5, 0.5]), 2)
    assert not is_over(best_of([0.5, 0.4, 0.4, 0.4]), None)
    assert not is_over(None, 1)


def test_another_metric_starts_anew():
    best = best_of([0.9, 0.1, 0.1])
    assert updated(best, metric="loss", step=40, values={"loss": 3.0}) == Best("loss", 40, 3.0)


def test_a_metric_that_is_not_measured_is_an_error_with_those_that_are():
    with pytest.raises(VlmtuneError, match="exact_match or loss"):
        updated(None, metric="accuracy", step=1, values={"exact_match": 0.1, "loss": 1.0})
