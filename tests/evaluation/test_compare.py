from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.test_runner import asked
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.compare import compare, mcnemar, paired_differences
from vlmtune.evaluation.metrics.base import Mean, bootstrap_intervals
from vlmtune.evaluation.results import Result, is_finished, read_result, write_report
from vlmtune.evaluation.runner import score_answers

MEAN = Mean("accuracy", lambda sample: 0.0)


def result(folder: Path, name: str, texts: Sequence[str], *, task: str = "vqa") -> Result:
    """A finished evaluation of questions whose answer is red, on a picture each."""
    conversations = [asked(n, "red", picture=f"{n}.png", folder=folder) for n in range(len(texts))]
    for n in range(len(texts)):
        (folder / f"{n}.png").write_bytes(b"-")
    write_report(score_answers(conversations, texts, task=task), folder / name)
    return read_result(folder / name, name)


@pytest.mark.parametrize(
    ("right_to_wrong", "wrong_to_right", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (3, 0, 0.25),  # 2 * 1/8
        (1, 4, 0.375),  # 2 * (1 + 5) / 32
        (4, 1, 0.375),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (5, 5, 1.0),
    ],
)
def test_mcnemar_by_hand(right_to_wrong: int, wrong_to_right: int, p_value: float) -> None:
    test = mcnemar(right_to_wrong, wrong_to_right)
    assert test.p_value == pytest.approx(p_value, rel=1e-12)


@pytest.mark.parametrize(("b", "c"), [(3, 9), (40, 17), (700, 812)])
def test_mcnemar_is_the_binomial_sum_in_whole_numbers(b: int, c: int) -> None:
    exact = Fraction(2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)), 2 ** (b + c))
    assert mcnemar(b, c).p_value == pytest.approx(float(exact), rel=1e-9)
    one_sided = float(exact) / 2
    assert mcnemar(b, c).p_value != pytest.approx(one_sided, rel=0.1)


@pytest.mark.parametrize(("b", "c"), [(3, 9), (40, 17), (700, 812), (60_000, 60_900)])
def test_mcnemar_is_scipys_binomial_test(b: int, c: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert mcnemar(b, c).p_value == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-7)


def sums(scores: Sequence[float]) -> np.ndarray:
    return np.array([(score, 1.0) for score in scores])


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    """The other is right wherever the first is, and on 10 of 100 samples more."""
    first, other = [1.0] * 50 + [0.0] * 50, [1.0] * 60 + [0.0] * 40
    found = paired_differences(
        sums(first), sums(other), figures=MEAN.figures, clusters=range(100), seed=0
    )["accuracy"]
    assert (found.first, found.value, found.count) == (0.5, 0.6, 100)
    assert found.difference == pytest.approx(0.1)
    # The number of gains in a resample is Binomial(100, 0.1): 95 % of it lies in 5 to 16.
    assert 0.04 <= found.low <= 0.06
    assert 0.15 <= found.high <= 0.17
    alone = bootstrap_intervals(sums(other), figures=MEAN.figures, clusters=range(100), seed=0)[
        "accuracy"
    ]
    assert alone.low < 0.52  # each by itself, the two intervals overlap


def test_pictures_are_drawn_as_wholes() -> None:
    """All gains are on one of two pictures: half of the resamples hold it once, a quarter never."""
    first, other = [0.0] * 20, [1.0] * 10 + [0.0] * 10
    clusters = ["a"] * 10 + ["b"] * 10
    found = paired_differences(
        sums(first), sums(other), figures=MEAN.figures, clusters=clusters, seed=0
    )["accuracy"]
    assert (found.low, found.difference, found.high) == (0.0, 0.5, 1.0)


def test_a_target_is_compared_with_the_first(tmp_path: Path) -> None:
    first = result(tmp_path, "base", ["red", "red", "blue", "blue", "red"])
    other = result(tmp_path, "tuned", ["red", "blue", "red", "red", "Red."])
    (comparison,), changes = compare([first, other], metrics=["exact_match"])
    difference = comparison.metrics["exact_match"]
    assert (difference.first, difference.value) == (0.6, 0.8)
    test = comparison.mcnemar["exact_match"]
    assert (test.right_to_wrong, test.wrong_to_right) == (1, 2)
    assert [change.row["id"] for change in changes] == ["1", "2", "3"]
    row = changes[0].as_row()
    assert row["predictions"] == {"base": "red", "tuned": "blue"}
    assert row["scores"] == {"base": 1.0, "tuned": 0.0}
    assert row["changes"] == {"tuned": "right_to_wrong"}
    assert changes[1].changes == {"tuned": "wrong_to_right"}
    plain = asdict(comparison)
    assert (plain["target"], plain["against"]) == ("tuned", "base")
    json.dumps(plain)


def test_each_target_is_compared_with_the_first_not_with_the_one_before(tmp_path: Path) -> None:
    names = {"base": ["red", "red"], "worse": ["blue", "blue"], "same": ["red", "red"]}
    results = [result(tmp_path, name, texts) for name, texts in names.items()]
    comparisons, changes = compare(results)
    assert [c.metrics["exact_match"].difference for c in comparisons] == [-1.0, 0.0]
    assert all(change.changes == {"worse": "right_to_wrong"} for change in changes)


def test_scores_between_right_and_wrong_have_no_mcnemar(tmp_path: Path) -> None:
    metrics = ["vqa_accuracy"]
    ten = ("red",) * 2 + ("blue",) * 8
    conversations = [asked(n, "red", answers=ten) for n in range(2)]
    for name, texts in {"a": ["red", "red"], "b": ["red", "blue"]}.items():
        report = score_answers(conversations, texts, task="vqa", metrics=metrics)
        write_report(report, tmp_path / name)
    results = [read_result(tmp_path / name, name) for name in "ab"]
    (comparison,), changes = compare(results, metrics=metrics)
    assert comparison.mcnemar == {}
    assert changes[0].changes == {"b": "better"}


def test_choices_by_likelihood_are_compared_by_the_scores_in_the_rows(tmp_path: Path) -> None:
    conversations = [replace(asked(n), options=("red", "blue")) for n in range(3)]
    texts = ["red"] * 3
    for name, chosen in {"a": [0, 0, 1], "b": [0, 1, 1]}.items():
        report = score_answers(
            conversations, texts, task="choice", metrics=["choice_likelihood"], chosen=chosen
        )
        write_report(report, tmp_path / name)
    results = [read_result(tmp_path / name, name) for name in "ab"]
    (comparison,), _ = compare(results, metrics=["choice_likelihood"])
    difference = comparison.metrics["choice_likelihood"]
    assert difference.difference == pytest.approx(-1 / 3)
    assert comparison.mcnemar["choice_likelihood"].right_to_wrong == 1
    without = score_answers(conversations, texts, task="choice")
    write_report(without, tmp_path / "c")
    with pytest.raises(VlmtuneError, match="has no choice_likelihood"):
        compare([results[0], read_result(tmp_path / "c", "c")], metrics=["choice_likelihood"])


def test_a_test_has_the_name_of_the_figure_that_it_is_about(tmp_path: Path) -> None:
    conversations = [replace(asked(n), options=("red", "blue")) for n in range(4)]
    for name, text in {"a": "red", "b": "blue"}.items():
        texts = [text, "red", "red", "red"]
        write_report(score_answers(conversations, texts, task="choice"), tmp_path / name)
    results = [read_result(tmp_path / name, name) for name in "ab"]
    (comparison,), _ = compare(results)
    assert set(comparison.metrics) == {"choice_accuracy", "choice_unparsed"}
    assert list(comparison.mcnemar) == ["choice_accuracy"]
    assert comparison.mcnemar["choice_accuracy"].right_to_wrong == 1


def test_a_score_that_is_not_what_the_figure_averages_is_not_tested(tmp_path: Path) -> None:
    # Captions of one word: BLEU-4 of each is 0, BLEU-1 of the set is not.
    results = [
        result(tmp_path, name, texts, task="caption")
        for name, texts in {"a": ["red", "red"], "b": ["red", "blue"]}.items()
    ]
    (comparison,), _ = compare(results, metrics=["bleu"])
    assert comparison.metrics["bleu_1"].first == 1.0
    assert comparison.mcnemar == {}


def query(direction: str, number: int, r1: float) -> dict[str, object]:
    row = {"id": f"{number}:{direction}", "images": [f"{number}.png"], "question": "?"}
    row |= {"answer": "a", "answers": ["a"], "options": [], "prediction": "a"}
    return row | {"direction": direction, "scores": {"r1": r1, "r5": 1.0, "r10": 1.0, "mrr": r1}}


def test_retrieval_is_compared_in_each_direction(tmp_path: Path) -> None:
    ranks = {"a": ([1.0, 0.0], [1.0, 1.0]), "b": ([1.0, 1.0], [1.0, 0.5])}
    for name, (texts, pictures) in ranks.items():
        rows = [query("picture_to_text", n, r1) for n, r1 in enumerate(texts)]
        rows += [query("text_to_picture", n, r1) for n, r1 in enumerate(pictures)]
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "predictions.jsonl").write_text(lines)
        (tmp_path / name / "metrics.json").write_text('{"task": "retrieval", "metrics": {}}')
    (comparison,), changes = compare([read_result(tmp_path / name, name) for name in "ab"])
    assert comparison.metrics["picture_to_text_r1"].difference == 0.5
    assert comparison.metrics["text_to_picture_r1"].difference == -0.25
    assert comparison.metrics["text_to_picture_r5"].difference == 0.0
    assert comparison.mcnemar["picture_to_text_r1"].wrong_to_right == 1
    assert "text_to_picture_r1" not in comparison.mcnemar  # a tie is half right
    assert [change.changes["b"] for change in changes] == ["wrong_to_right", "worse"]


def test_an_answer_may_hold_any_character(tmp_path: Path) -> None:
    texts = ["one\u2028two\x85three\nfour\\ud83d \ud83d five é"]
    assert result(tmp_path, "a", texts).rows["0"]["prediction"] == texts[0]


def test_other_samples_or_other_references_are_refused(tmp_path: Path) -> None:
    first = result(tmp_path, "a", ["red", "blue"])
    fewer = result(tmp_path, "b", ["red"])
    with pytest.raises(VlmtuneError, match="not of the same samples"):
        compare([first, fewer])
    rows = (tmp_path / "a" / "predictions.jsonl").read_text()
    (tmp_path / "a" / "predictions.jsonl").write_text(
        rows.replace('"answer": "red"', '"answer": ""')
    )
    with pytest.raises(VlmtuneError, match="another answer"):
        compare([first, read_result(tmp_path / "a", "other")])
    captions = result(tmp_path, "c", ["red", "blue"], task="classification")
    with pytest.raises(VlmtuneError, match="the tasks differ"):
        compare([first, captions])


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("metrics.json", "[]", "not an object"),
        ("metrics.json", "{", "not JSON"),
        ("metrics.json", "{}", "not a report"),
        ("predictions.jsonl", '{"id": "1"}', "predictions.jsonl:1: the line is not a prediction"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, file: str, content: str, expected: str
) -> None:
    result(tmp_path, "a", ["red"])
    assert is_finished(tmp_path / "a")
    assert not is_finished(tmp_path)
    (tmp_path / "a" / file).write_text(content)
    with pytest.raises(VlmtuneError, match=expected):
        read_result(tmp_path / "a", "a")
