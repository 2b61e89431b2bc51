from __future__ import annotations

import pytest

from vlmtune.report.charts import (
    Series,
    downsample,
    draw_chart,
    nice_range,
    tick_labels,
    ticks_between,
)


def test_few_points_are_kept_as_they_are() -> None:
    points = [(0.0, 1.0), (1.0, 2.0)]
    assert downsample(points, 10) == tuple(points)


def test_many_points_are_thinned_and_no_spike_is_lost() -> None:
    points = [(float(x), 0.0) for x in range(100_000)]
    points[77_777] = (77_777.0, 9.0)
    points[12_345] = (12_345.0, -9.0)
    kept = downsample(points, 1000)
    assert len(kept) <= 1000
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {points[77_777], points[12_345]} <= set(kept)
    assert list(kept) == sorted(kept)
    every_hundredth = points[::100]  # what plain thinning would keep
    assert points[77_777] not in every_hundredth


@pytest.mark.parametrize(
    ("low", "high", "expected", "ticks"),
    [
        (0.79, 7.2, (0.0, 8.0), [0, 2, 4, 6, 8]),
        (64, 72, (64.0, 72.0), [64, 66, 68, 70, 72]),
        (-1, 1, (-1.0, 1.0), [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_a_range_ends_on_round_values(
    low: float, high: float, expected: tuple[float, float], ticks: list[float]
) -> None:
    found, values = nice_range(low, high)
    assert found == pytest.approx(expected)
    assert values == pytest.approx(ticks)


@pytest.mark.parametrize("value", [3.0, -2e-5, 1e12])
def test_a_constant_curve_lies_inside_its_range(value: float) -> None:
    (low, high), _ = nice_range(value, value)
    assert low < value < high
    assert nice_range(0.0, 0.0)[0] == (0.0, 1.0)


def test_steps_have_whole_ticks() -> None:
    assert ticks_between(0, 3, whole=True) == [0, 1, 2, 3]
    assert ticks_between(0, 60, whole=True) == [0, 20, 40, 60]


def test_points_are_placed_in_the_box_with_the_highest_on_top() -> None:
    series = Series("loss", ((0.0, 0.0), (5.0, 4.0), (10.0, 8.0)))
    chart = draw_chart("c", "Loss", [series], x_range=(0, 10))
    assert chart.lines[0].path == "M0 1000L500 500L1000 0"
    assert chart.lines[0].dots == "M0 1000h0M500 500h0M1000 0h0"
    assert [(t.percent, t.label) for t in chart.y_ticks][0] == (100, "0")


def test_a_single_point_is_drawn() -> None:
    chart = draw_chart("c", "Loss", [Series("loss", ((1.0, 2.0),))], x_range=(1, 1))
    assert chart.lines[0].path.startswith("M500 ")


@pytest.mark.parametrize(
    ("values", "unit", "labels"),
    [
        ([0, 1.45e9, 2.9e9], "bytes", ["0 GB", "1.45 GB", "2.9 GB"]),
        ([0.24, 0.25, 0.26], "share", ["24\u00a0%", "25\u00a0%", "26\u00a0%"]),
        ([0, 4000, 8000], "number", ["0", "4,000", "8,000"]),
        ([0, 2e-6, 4e-6], "number", ["0", "2e-6", "4e-6"]),
        ([2e-4, 2.5e-4, 3e-4], "number", ["2e-4", "2.5e-4", "3e-4"]),
        ([5e-4, 1e-3, 1.5e-3], "number", ["5e-4", "0.001", "0.0015"]),
        ([0.7911, 0.7912, 0.7913], "number", ["0.7911", "0.7912", "0.7913"]),
        ([1234.5, 1235.0], "number", ["1,234.5", "1,235"]),
        ([1.4250e9, 1.4255e9], "bytes", ["1.425 GB", "1.4255 GB"]),
        ([-2e6, 0, 2e6], "number", ["-2e6", "0", "2e6"]),
    ],
)
def test_ticks_have_the_digits_that_tell_them_apart(
    values: list[float], unit: str, labels: list[str]
) -> None:
    assert tick_labels(values, unit) == labels


@pytest.mark.parametrize(("low", "high"), [(1.99e-4, 2.01e-4), (3e-4, 3e-4), (0.79141, 0.79143)])
def test_no_tick_of_a_narrow_chart_is_written_twice(low: float, high: float) -> None:
    series = Series("language", ((0.0, low), (1.0, high)))
    chart = draw_chart("c", "Learning rate", [series], x_range=(0, 1))
    labels = [tick.label for tick in chart.y_ticks]
    assert len(set(labels)) == len(labels) > 2
