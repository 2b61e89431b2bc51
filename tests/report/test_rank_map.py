from __future__ import annotations

from vlmtune.report.charts import MAX_COLUMNS, draw_rank_map


def test_equal_ranks_make_one_stretch() -> None:
    ranks = [(10, 4), (20, 4), (30, 1), (40, 1)]
    drawn = draw_rank_map([{"step": step, "ranks": {"m.q_proj": rank}} for step, rank in ranks])
    assert drawn is not None
    stretches = [(s.left, s.width, s.rank, s.first, s.last) for s in drawn.rows[0].stretches]
    assert stretches == [(0, 50, 4, 10, 20), (50, 50, 1, 30, 40)]
    assert [s.opacity for s in drawn.rows[0].stretches] == [1.0, 0.25]
    assert (drawn.first_total, drawn.last_total, drawn.highest) == (4, 1, 4)


def test_layer_2_comes_before_layer_10_and_the_common_beginning_is_left_out() -> None:
    paths = ["model.layers.10.q_proj", "model.layers.2.q_proj"]
    drawn = draw_rank_map([{"step": 1, "ranks": dict.fromkeys(paths, 1)}])
    assert drawn is not None
    assert [row.label for row in drawn.rows] == ["2.q_proj", "10.q_proj"]
    assert sorted(paths) == paths  # the plain order is the other one


def test_many_lines_are_thinned_to_the_first_and_the_last() -> None:
    drawn = draw_rank_map([{"step": s, "ranks": {"m": s % 7}} for s in range(1, 1001)])
    assert drawn is not None
    stretches = drawn.rows[0].stretches
    assert len(stretches) <= MAX_COLUMNS
    assert (stretches[0].first, stretches[-1].last) == (1, 1000)


def test_without_ranks_there_is_no_map() -> None:
    assert draw_rank_map([{"step": 1, "loss": 2.0}, {"step": 2, "ranks": None}]) is None
