from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.runs import make_run, write_evaluation, write_json, write_lines
from vlmtune.report.gallery import draw_scale, mixups
from vlmtune.report.headline import Finding, difference, findings, grouped_reasons, parse_recipe
from vlmtune.report.run import choose_pair, choose_widest, guard_pair, read_evaluations, read_run

GUARD = "eval: {guard: {data: guard.jsonl, max_drop: 0.1}}\n"


def found(run: Path) -> list[Finding]:
    record = read_run(run)
    evaluations = read_evaluations(record)
    pair = choose_pair(evaluations, record)
    recipe = parse_recipe(record.resolved_text)
    return findings(
        record,
        recipe,
        pair=pair,
        widest=choose_widest(evaluations, record, pair),
        guard=guard_pair(evaluations, record),
    )


@pytest.mark.parametrize(
    ("before", "after", "verdict", "tone"),
    [
        (["no"] * 20, ["yes"] * 15 + ["no"] * 5, "Yes.", "good"),
        (["yes"] * 15 + ["no"] * 5, ["no"] * 20, "It got worse.", "bad"),
        (["no", "yes"] * 10, ["yes", "no"] * 10, "No clear change.", "plain"),
    ],
)
def test_learning_is_judged_by_the_paired_difference(
    tmp_path: Path, tiny_vlm: Path, before: list[str], after: list[str], verdict: str, tone: str
) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=20, before=before, after=after)
    learned = found(run)[0]
    assert learned.answer.startswith(verdict)
    assert learned.tone == tone
    assert "Training loss went from 2 to 0.129." in learned.details


def test_the_losses_are_those_up_to_the_best_step(tmp_path: Path, tiny_vlm: Path) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=4)
    lines = [{"step": s, "loss": 5.0 - s, "eval_loss": 4.0 + (s - 2) ** 2} for s in (1, 2, 3, 4)]
    write_lines(run / "metrics.jsonl", lines)
    best = {"step": 2, "metric": "loss", "value": 4.0}
    write_json(run / "summary.json", {"steps": 4, "stopped_by": None, "best": best})
    details = found(run)[0].details
    assert "Held-out loss went from 5 to 4." in details  # not to 8, the last step's
    assert "Training loss went from 4 to 3." in details


def test_the_difference_is_the_mean_of_the_samples_differences(
    tmp_path: Path, tiny_vlm: Path
) -> None:
    run = make_run(
        tmp_path / "r",
        model=tiny_vlm,
        num_samples=4,
        before=["yes", "no", "no", "no"],
        after=["no", "yes", "yes", "yes"],
    )
    record = read_run(run)
    pair = choose_pair(read_evaluations(record), record)
    change = difference(pair, "exact_match")
    assert change is not None
    assert change.value == pytest.approx((-1 + 1 + 1 + 1) / 4)
    assert change.low < 0.5 < change.high
    assert difference(pair, "another") is None
    assert pair.after is not None
    pair.after.rows[0]["scores"] = {"exact_match": 1.0}  # no longer what the figure is the mean of
    assert difference(pair, "exact_match") is None


def test_the_worst_slice_and_the_commonest_mix_up_are_named(tmp_path: Path, tiny_vlm: Path) -> None:
    after = ["yes" if n % 2 == 0 else "maybe" for n in range(20)]  # odd ones are of kind shape
    wrong = found(make_run(tmp_path / "r", model=tiny_vlm, num_samples=20, after=after))[1]
    assert wrong.answer.startswith("Worst on shape (0.0\u00a0%)")
    assert wrong.details == (
        "10 of 20 predictions are wrong.",
        "Most frequent: “maybe” where “yes” is right (10 times).",
    )


def test_a_later_evaluation_on_more_samples_says_what_is_still_wrong(
    tmp_path: Path, tiny_vlm: Path
) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=4, after=["yes"] * 4)
    data = tmp_path / "r-data" / "data.jsonl"
    write_evaluation(run, 30, data, ["yes"] * 9 + ["no"], name="data-20260101-000000")
    learned, wrong, *_ = found(run)
    assert "went from 0.0\u00a0% to 100.0\u00a0%" in learned.answer  # the same four samples
    assert any(d.startswith("Over 10 samples (data-2026") for d in learned.details)
    assert "1 of 10 predictions is wrong." in wrong.details


def test_the_scale_has_all_samples_first_and_then_the_worst_slice(
    tmp_path: Path, tiny_vlm: Path
) -> None:
    record = read_run(make_run(tmp_path / "r", model=tiny_vlm, num_samples=20))
    pair = choose_pair(read_evaluations(record), record)
    scale = draw_scale(pair)
    assert scale is not None
    assert [row.label for row in scale.rows] == ["all", "shape", "color"]
    assert scale.rows[0].after is not None and scale.rows[0].before is not None
    assert (scale.rows[0].before.at, scale.rows[0].after.at) == (0, 50)
    assert pair.after is not None
    assert [(m.answered, m.right, m.count) for m in mixups(pair.after)] == [("no", "yes", 10)]


def test_skipped_samples_are_counted_by_reason(tmp_path: Path, tiny_vlm: Path) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=2)
    entries = [
        {"file": "a.jsonl", "line": n, "reason": f"a.jsonl:{n}: too long; got: {n} tokens"}
        for n in (3, 9)
    ]
    write_lines(run / "skipped.jsonl", [*entries, {"reason": "a picture is missing"}])
    skipped = found(run)[2]
    assert (skipped.tone, skipped.answer) == ("bad", "Yes, training left out 3 samples.")
    assert skipped.details == ("2 samples: too long", "1 sample: a picture is missing")
    assert grouped_reasons([{}]) == [("no reason given", 1)]


@pytest.mark.parametrize(("after", "tone"), [(19, "good"), (17, "bad")])
def test_the_guard_holds_within_what_the_recipe_allows(
    tmp_path: Path, tiny_vlm: Path, after: int, tone: str
) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=20, recipe=GUARD)
    data = tmp_path / "r-data" / "data.jsonl"
    for step, right in ((0, 20), (30, after)):
        answers = ["yes"] * right + ["no"] * (20 - right)
        write_evaluation(run, step, data, answers, name=f"guard-step-{step:06d}")
    forgotten = found(run)[3]
    assert forgotten.tone == tone
    assert "from 100.0\u00a0%" in forgotten.answer
    assert forgotten.details == ("The recipe allows it to get worse by at most 10 points.",)


def test_where_nothing_was_known_nothing_is_forgotten(tmp_path: Path, tiny_vlm: Path) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=2, recipe=GUARD)
    for step in (0, 30):
        data = tmp_path / "r-data" / "data.jsonl"
        write_evaluation(run, step, data, ["no", "no"], name=f"guard-step-{step:06d}")
    assert found(run)[3].answer.startswith("There was nothing to forget")


def test_what_is_not_known_is_said(tmp_path: Path, tiny_vlm: Path) -> None:
    run = make_run(tmp_path / "r", model=tiny_vlm, num_samples=2, recipe=GUARD)
    assert "not measured before training" in found(run)[3].answer
    (tmp_path / "bare").mkdir()
    write_json(tmp_path / "bare" / "environment.json", {})
    answers = [finding.answer for finding in found(tmp_path / "bare")]
    assert answers == [
        "No answers were evaluated yet.",
        "Not known: no answers were evaluated.",
        "Not so far.",
        "Not measured: the recipe has no eval.guard.",
    ]
