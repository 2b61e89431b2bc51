from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.report.runs import make_run, write_evaluation, write_json
from vlmtune.report.run import choose_pair, guard_pair, is_right, read_evaluations, read_run


@pytest.fixture
def run(tmp_path: Path, tiny_vlm: Path) -> Path:
    return make_run(tmp_path / "run", model=tiny_vlm, num_samples=4, num_steps=30)


def data_of(run: Path) -> Path:
    return run.parent / "run-data" / "data.jsonl"


def chosen(run: Path) -> tuple[str | None, str | None]:
    record = read_run(run)
    pair = choose_pair(read_evaluations(record), record)
    return (
        None if pair.before is None else pair.before.name,
        None if pair.after is None else pair.after.name,
    )


def test_before_is_step_0_and_after_the_newest_on_the_same_data(run: Path) -> None:
    older = write_evaluation(run, 10, data_of(run), ["yes"] * 4)
    os.utime(older / "metrics.json", (1000, 1000))
    assert chosen(run) == ("step-000000", "step-000030")


def test_a_later_eval_of_the_run_is_the_newest(run: Path) -> None:
    for step in (0, 30):
        os.utime(run / f"eval/step-{step:06d}/metrics.json", (1000, 1000))
    write_evaluation(run, 30, data_of(run), ["yes"] * 4, name="data-20260101-000000")
    assert chosen(run) == ("step-000000", "data-20260101-000000")


def test_other_questions_are_not_compared(run: Path) -> None:
    other = write_evaluation(run, 30, data_of(run), ["yes"] * 4, name="other")
    rows = (other / "predictions.jsonl").read_text().replace('"q-', '"z-')
    (other / "predictions.jsonl").write_text(rows)
    assert chosen(run) == ("step-000000", "step-000030")


def test_the_best_step_speaks_for_the_result(run: Path) -> None:
    write_evaluation(run, 20, data_of(run), ["yes"] * 4)
    best = {"step": 20, "metric": "exact_match", "value": 1.0}
    write_json(run / "summary.json", {"steps": 30, "stopped_by": None, "best": best})
    assert chosen(run) == ("step-000000", "step-000020")


def test_one_side_alone_is_shown(run: Path) -> None:
    for path in (run / "eval" / "step-000000").iterdir():
        path.unlink()
    assert chosen(run) == (None, "step-000030")


def test_an_unfinished_evaluation_is_left_out(run: Path) -> None:
    (run / "eval" / "step-000040").mkdir()
    (run / "eval" / "step-000040" / "answers-0.part.jsonl").write_text("{}\n")
    assert chosen(run) == ("step-000000", "step-000030")


def test_the_guard_is_a_pair_of_its_own(run: Path) -> None:
    for step in (0, 20, 30):
        name = f"guard-step-{step:06d}"
        write_evaluation(run, step, data_of(run), ["yes"] * 4, name=name)
    record = read_run(run)
    evaluations = read_evaluations(record)
    guard = guard_pair(evaluations, record)
    assert guard.before is not None and guard.after is not None
    assert (guard.before.name, guard.after.name) == ("guard-step-000000", "guard-step-000030")
    assert chosen(run) == ("step-000000", "step-000030")


def test_the_guard_is_that_of_the_best_step_also_beside_a_later_eval(run: Path) -> None:
    for step in (0, 20, 30):
        name = f"guard-step-{step:06d}"
        write_evaluation(run, step, data_of(run), ["yes"] * 4, name=name)
    write_evaluation(run, 30, data_of(run), ["yes"] * 4, name="later")
    best = {"step": 20, "metric": "exact_match", "value": 1.0}
    write_json(run / "summary.json", {"steps": 30, "stopped_by": None, "best": best})
    record = read_run(run)
    guard = guard_pair(read_evaluations(record), record)
    assert guard.after is not None
    assert guard.after.name == "guard-step-000020"


def test_an_answer_with_a_line_separator_is_one_line(run: Path) -> None:
    path = run / "eval" / "step-000030" / "predictions.jsonl"
    text = path.read_text(encoding="utf-8").replace(
        '"prediction": "yes"', '"prediction": "a\u2028b"'
    )
    path.write_text(text, encoding="utf-8")
    record = read_run(run)
    rows = next(e for e in read_evaluations(record) if e.step == 30).rows
    assert [row["prediction"] for row in rows] == ["a\u2028b", "no"] * 2
    assert record.unreadable == {}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"score": 1.0}, True),
        ({"score": 0.3}, False),
        ({"score": None}, None),
        ({"rank": 1}, True),
        ({"rank": 2}, False),
        ({}, None),
        (None, None),
    ],
)
def test_a_row_is_right_by_its_score_or_its_rank(row: dict | None, expected: bool | None) -> None:
    assert is_right(row) is expected
