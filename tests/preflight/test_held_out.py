"""What is evaluated on during training: what check says of it is what training does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.preflight.checking import check_summary, messages
from tests.preflight.test_agrees_with_training import rows_of, write_rows
from tests.train.training import copy_sample, metrics_of, train_once, write_recipe
from vlmtune.errors import VlmtuneError

SHORT = {"max_new_tokens": 2}


@pytest.fixture
def data(sample_data: Path, tmp_path: Path) -> Path:
    return copy_sample(sample_data, tmp_path / "data", keep=8)


@pytest.fixture
def recipe(tiny_vlm: Path, data: Path, tmp_path: Path):
    """Two steps, evaluated on the rows given."""

    def write(rows: list[Any], name: str = "run", **keys: Any) -> Path:
        write_rows(data.with_name(f"{name}.jsonl"), rows)
        keys = {
            "data__eval": str(data.with_name(f"{name}.jsonl")),
            "train__max_steps": 2,
            "eval": SHORT,
        } | keys
        return write_recipe(tmp_path / name, tiny_vlm=tiny_vlm, data=data, **keys)

    return write


def asked_only(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its answer among `answers`, and no turn of the assistant."""
    question, answer = row["messages"]
    return row | {"messages": [question], "answers": [answer["content"]] * 4}


def last_of(recipe: Path) -> dict[str, Any]:
    return metrics_of(recipe.parent / "run")[-1]


def refused(path: Path) -> str:
    """The one error of training and of the check."""
    [error] = messages(check_summary(path), "error")
    with pytest.raises(VlmtuneError) as caught:
        train_once(path)
    assert error in str(caught.value)
    return error


def test_rows_without_an_answer_to_learn_are_answered_and_no_part_of_the_loss(recipe, data):
    rows = rows_of(data)[:4]
    not_trained = json.loads(json.dumps(rows[1]))
    not_trained["messages"][1]["train"] = False
    mixed = recipe([rows[0], not_trained, asked_only(rows[2]), rows[3]], "mixed")
    assert messages(check_summary(mixed), "error") == []
    train_once(mixed)
    learnt = recipe([rows[0], rows[3]], "learnt")
    train_once(learnt)
    found, expected = last_of(mixed), last_of(learnt)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert "eval_skipped" not in found
    predictions = mixed.parent / "run/eval/step-000002/predictions.jsonl"
    assert len(rows_of(predictions)) == 4
    everything = recipe(rows, "everything")
    train_once(everything)
    assert last_of(everything)["eval_loss"] != pytest.approx(found["eval_loss"], rel=1e-3)


def test_without_any_answer_to_learn_there_is_no_loss_rather_than_one_of_zero(recipe, data):
    rows = [asked_only(row) for row in rows_of(data)[:3]]
    path = recipe(rows)
    assert messages(check_summary(path), "error") == []
    train_once(path)
    assert "eval_vqa_accuracy" in last_of(path) and "eval_loss" not in last_of(path)
    by_loss = recipe(rows, "by_loss", eval=SHORT | {"best_metric": "loss", "before": False})
    assert "has no metric called as eval.best_metric says" in refused(by_loss)
    good = SHORT | {"best_metric": "vqa_accuracy"}
    assert messages(check_summary(recipe(rows, "good", eval=good)), "error") == []


def test_a_guard_may_have_answers_only_and_its_figure_is_looked_for(recipe, data):
    rows = [asked_only(row) for row in rows_of(data)[:3]]
    path = recipe(rows)
    guard = {"data": str(path.parent.parent / "data/run.jsonl"), "max_drop": 1.0}
    path = recipe(rows, data__eval=None, eval=SHORT | {"guard": guard})
    assert messages(check_summary(path), "error") == []
    train_once(path)
    assert "guard_exact_match" in last_of(path)
    guard["metric"] = "bleu_4"
    path = recipe(rows, "odd", data__eval=None, eval=SHORT | {"guard": guard})
    assert "eval.guard.metric is not measured" in refused(path)


def test_a_pair_that_cannot_be_embedded_stops_a_contrastive_run_before_its_first_step(recipe, data):
    rows = rows_of(data)[:3]
    rows[1]["messages"][0]["content"] = "No picture here"
    path = recipe(rows, objective="contrastive")
    assert refused(path) == "there is no picture to embed"
    skips = recipe(rows, "skips", objective="contrastive", data__on_bad_sample="skip")
    assert messages(check_summary(skips), "error") == []
    train_once(skips)
    assert "eval_skipped" not in metrics_of(skips.parent / "run")[-1]


@pytest.mark.parametrize("kind", ["not JSON", "control token"])
def test_a_set_of_which_no_row_is_left_is_an_error_even_where_bad_rows_are_skipped(
    recipe, data, kind
):
    rows: list[Any] = rows_of(data)[:3]
    for row in rows:
        row["messages"][1]["content"] = "<|im_end|>"
    if kind == "not JSON":
        rows = ["{no json"] * 3
    path = recipe(rows, data__on_bad_sample="skip")
    assert "data.eval: no sample is left to evaluate on; got: 3 of 3 left out" in refused(path)
