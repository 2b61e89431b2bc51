from __future__ import annotations

import math

from tests.report.runs import metric_lines
from vlmtune.report.charts import MAX_CHARTS, metric_charts


def drawn(lines: list[dict]) -> dict[str, list[str]]:
    return {chart.title: [line.name for line in chart.lines] for chart in metric_charts(lines)[0]}


def test_numbers_that_belong_together_share_a_chart() -> None:
    charts = drawn(metric_lines(5))
    assert charts["Loss"] == ["training", "held-out"]
    assert charts["Learning rate"] == ["language", "vision"]
    assert charts["Gradient norm"] == ["total", "language"]
    assert charts["Metrics on held-out data"] == ["exact match"]
    assert next(iter(charts)) == "Loss"


def test_any_further_number_is_drawn_under_its_name() -> None:
    charts = drawn([{"step": 1, "loss": 1.0, "temperature": 0.05, "pairs": 32, "note": "text"}])
    assert charts["Temperature"] == ["temperature"]
    assert charts["Pairs"] == ["pairs"]
    assert "Note" not in charts


def test_a_rank_and_a_share_on_held_out_data_do_not_share_an_axis() -> None:
    lines = [{"step": 1, "eval_recall_at_1": 0.5, "eval_median_rank": 1.0, "guard_accuracy": 0.9}]
    charts = drawn(lines)
    assert charts["Metrics on held-out data"] == ["recall at 1"]
    assert charts["Metrics on the guard's data"] == ["accuracy"]
    assert "Eval median rank" in charts


def test_what_is_not_finite_is_left_out() -> None:
    charts, _ = metric_charts([{"step": 1, "loss": math.nan}, {"step": 2, "loss": 2.0}])
    assert [line.points for line in charts[0].lines] == [((2.0, 2.0),)]
    assert metric_charts([{"step": 1, "loss": math.inf}])[0] == []


def test_ranks_of_modules_are_no_curves() -> None:
    assert drawn([{"step": 1, "ranks": {"a.q_proj": 3}, "total_rank": 3}]) == {
        "Total rank": ["total rank"]
    }


def test_charts_beyond_the_limit_are_named() -> None:
    charts, left_out = metric_charts([{"step": 1} | {f"x{i:02d}": i for i in range(50)}])
    assert len(charts) == MAX_CHARTS
    assert left_out == [f"x{i:02d}" for i in range(MAX_CHARTS, 50)]


def test_many_lines_are_parted_evenly_over_charts() -> None:
    figures = {f"eval_figure_{n}": 0.5 for n in range(8)}
    charts = drawn([{"step": 1} | figures])
    assert {title: len(lines) for title, lines in charts.items()} == {
        "Metrics on held-out data, 1": 4,
        "Metrics on held-out data, 2": 4,
    }
