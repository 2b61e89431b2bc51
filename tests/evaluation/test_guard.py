from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.guard import guard_section, guard_verdict, guarded_metric, read_figures
from vlmtune.evaluation.metrics.base import Interval
from vlmtune.evaluation.results import EvalReport, write_report
from vlmtune.recipe.schema import DecodingSection, EvalSection, GuardSection


@pytest.mark.parametrize(
    ("metric", "before", "after", "has_fallen"),
    [
        ("exact_match", 0.90, 0.87, True),
        ("exact_match", 0.90, 0.88, False),  # in binary fractions the drop is above 0.02
        ("exact_match", 0.90, 0.95, False),
        ("loss", 0.90, 0.95, True),
        ("loss", 0.90, 0.60, False),
        ("text_to_image_median_rank", 3.0, 7.0, True),
        ("text_to_image_median_rank", 7.0, 3.0, False),
    ],
)
def test_the_guard_says_whether_the_model_got_worse(
    metric: str, before: float, after: float, has_fallen: bool
) -> None:
    verdict = guard_verdict(before, after, metric=metric, max_drop=0.02)
    assert verdict.has_fallen == has_fallen
    assert str(verdict).startswith("forgotten: ") == has_fallen
    assert verdict.as_dict()["has_fallen"] == has_fallen


def test_the_guard_has_a_task_of_its_own_and_the_rest_of_the_section() -> None:
    section = EvalSection(
        metrics=["vqa_accuracy"],
        max_new_tokens=7,
        decoding=DecodingSection(method="beam"),
        guard=GuardSection(data="old.jsonl", task="caption"),
    )
    used = guard_section(section)
    assert (used.task, used.metrics, used.max_new_tokens) == ("caption", [], 7)
    assert used.decoding.method == "beam"
    named = GuardSection(data="old.jsonl", metric="exact_match")
    assert guard_section(EvalSection(guard=named)).metrics == ["exact_match"]
    figure = GuardSection(data="old.jsonl", metric="a_figure")
    assert guard_section(EvalSection(guard=figure)).metrics == []


def test_the_guarded_figure_is_the_first_or_the_named_one() -> None:
    figures = {"exact_match": 0.5, "vqa_accuracy": 0.6}
    assert guarded_metric(figures, None) == "exact_match"
    assert guarded_metric(figures, "vqa_accuracy") == "vqa_accuracy"
    with pytest.raises(VlmtuneError, match="did you mean 'vqa_accuracy'"):
        guarded_metric(figures, "vqa_acuracy")


def test_figures_are_read_from_a_report(tmp_path: Path) -> None:
    report = EvalReport("vqa", 2, {"exact_match": Interval(0.5, 0.0, 1.0, 2)}, {}, [])
    assert read_figures(tmp_path / "guard") is None
    write_report(report, tmp_path / "guard")
    assert read_figures(tmp_path / "guard") == {"exact_match": 0.5}
    (tmp_path / "guard" / "metrics.json").write_text(json.dumps({"metrics": [1]}))
    with pytest.raises(VlmtuneError, match="not a report"):
        read_figures(tmp_path / "guard")
