import math
from collections.abc import Hashable, Sequence

import numpy as np
import pytest

from vlmtune.evaluation.metrics.base import Interval, Mean, bootstrap_intervals, divided


def bootstrap_interval(
    scores: Sequence[float], *, clusters: Sequence[Hashable], seed: int
) -> Interval:
    """Of a mean."""
    sums = np.array([(score, 1.0) for score in scores]).reshape(-1, 2)
    mean = Mean("mean", lambda _: None)
    return bootstrap_intervals(sums, figures=mean.figures, clusters=clusters, seed=seed)["mean"]


def test_the_interval_of_independent_scores_is_the_binomial_one() -> None:
    scores = [1.0] * 300 + [0.0] * 100
    interval = bootstrap_interval(scores, clusters=range(400), seed=0)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert interval.value == 0.75
    assert interval.count == 400
    assert interval.low == pytest.approx(0.75 - half, abs=0.006)
    assert interval.high == pytest.approx(0.75 + half, abs=0.006)


def test_questions_on_one_picture_count_as_one_draw() -> None:
    # Ten questions a picture, all right or all wrong: as uncertain as one question a picture.
    scores = [1.0] * 300 + [0.0] * 100
    clusters = [number // 10 for number in range(400)]
    interval = bootstrap_interval(scores, clusters=clusters, seed=0)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 40)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)
    alone = bootstrap_interval(scores, clusters=range(400), seed=0)  # ignores the pictures
    assert alone.high - alone.low < 0.5 * (interval.high - interval.low)


def test_pictures_with_many_questions_weigh_more() -> None:
    # A mean of sums over counts, not a mean of the pictures' means.
    interval = bootstrap_interval([1.0, 0.0, 0.0, 0.0], clusters=["a", "b", "b", "b"], seed=0)
    assert interval.value == 0.25
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_the_interval_depends_on_the_seed_only() -> None:
    scores = np.random.default_rng(1).random(60).tolist()
    clusters = [number // 3 for number in range(60)]
    first = bootstrap_interval(scores, clusters=clusters, seed=5)
    assert first == bootstrap_interval(scores, clusters=clusters, seed=5)
    assert first != bootstrap_interval(scores, clusters=clusters, seed=6)


def test_one_picture_gives_no_width_and_no_scores_no_interval() -> None:
    interval = bootstrap_interval([1.0, 0.0], clusters=["a", "a"], seed=0)
    assert (interval.low, interval.value, interval.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no samples"):
        bootstrap_interval([], clusters=[], seed=0)


def test_a_ratio_is_one_of_sums_and_leaves_out_resamples_without_a_denominator() -> None:
    # Precision: true positives over positive predictions; the third picture has none.
    sums = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    intervals = bootstrap_intervals(
        sums,
        figures=lambda s: {"precision": divided(s[..., 0], s[..., 1])},
        clusters="abc",
        seed=0,
    )
    assert intervals["precision"].value == 0.5
    assert (intervals["precision"].low, intervals["precision"].high) == (0.0, 1.0)


def test_a_figure_that_is_not_defined_is_left_out() -> None:
    sums = np.zeros((3, 2))
    figures = bootstrap_intervals(
        sums, figures=lambda s: {"f1": divided(s[..., 0], s[..., 1])}, clusters="abc", seed=0
    )
    assert figures == {}
