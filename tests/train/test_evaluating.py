"""Evaluation during training: before the first step, the best checkpoint, patience, the guard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.training import adapter_of, copy_sample, metrics_of, train_once, write_recipe
from vlmtune.errors import VlmtuneError
from vlmtune.train.checkpoint import load_checkpoint


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_vlm: Path, sample_data: Path):
    """Twelve steps, evaluated at every third on six of 24 samples. `worsens`: on long
    answers of words that are not taught, so that each evaluation is worse than the one before."""

    def make(name: str, *, worsens: bool = False, **keys: Any) -> Path:
        data = copy_sample(sample_data, tmp_path / "data", keep=24)
        if worsens:
            keys |= {"data__eval": str(_with_other_answers(data)), "train__learning_rate": 1e-2}
        settings = {
            "data__eval": str(data),
            "train__eval_every": 3,
            "train__keep_checkpoints": 1,
            "eval": {"max_samples": 6, "max_new_tokens": 3},
        }
        settings["eval"] |= keys.pop("eval", {})
        return write_recipe(
            tmp_path / name, tiny_vlm=tiny_vlm, data=data, rank=4, **(settings | keys)
        )

    return make


def _with_other_answers(data: Path) -> Path:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = "umbrella kitchen window " * 6
    path = data.with_name("other.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values_of(run: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in metrics_of(run) if name in line}


def test_the_model_is_measured_before_the_first_step_and_answers_are_kept(make_recipe):
    recipe = make_recipe("run")
    train_once(recipe)
    run = recipe.parent / "run"
    assert list(values_of(run, "eval_loss")) == [0, 3, 6, 9, 12]
    assert values_of(run, "eval_loss")[12] < values_of(run, "eval_loss")[0]
    rows = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(run.glob("eval/step-*/predictions.jsonl"))
    ]
    assert [len(of_step) for of_step in rows] == [6] * 5
    ids = [[row["id"] for row in of_step] for of_step in rows]
    assert all(of_step == ids[0] for of_step in ids)  # the same fixed subset each time
    about = json.loads((run / "eval" / "step-000003" / "metrics.json").read_text())
    assert about["step"] == 3
    assert about["metrics"]["exact_match"]["value"] == values_of(run, "eval_exact_match")[3]


def test_the_subset_is_not_the_first_rows_of_the_file(make_recipe, tmp_path: Path):
    recipe = make_recipe("run")
    train_once(recipe, "train.max_steps=1")
    lines = (recipe.parent / "run/eval/step-000000/predictions.jsonl").read_text().splitlines()
    first = [json.loads(line)["id"] for line in (tmp_path / "data/train.jsonl").open()][:6]
    assert [json.loads(line)["id"] for line in lines] != first


def test_evaluating_changes_no_step(make_recipe):
    quiet, often = make_recipe("quiet", dropout=0.1), make_recipe("often", dropout=0.1)
    train_once(quiet, "data.eval=null")
    train_once(often)
    for name, tensor in adapter_of(quiet.parent / "run").items():
        assert torch.equal(tensor, adapter_of(often.parent / "run")[name]), name


def test_the_result_is_the_best_steps_and_its_checkpoint_outlives_newer_ones(make_recipe):
    recipe = make_recipe("run", worsens=True, eval={"best_metric": "loss"}, train__save_every=3)
    summary = train_once(recipe)
    run = recipe.parent / "run"
    losses = values_of(run, "eval_loss")
    del losses[0]
    best = min(losses, key=lambda step: losses[step])
    assert best < 12, losses
    assert summary["best"] == {
        "metric": "loss",
        "step": best,
        "value": losses[best],
        "num_since": len([step for step in losses if step > best]),
    }
    kept = {path.name: path for path in (run / "checkpoints").iterdir()}
    assert set(kept) == {f"step-{best:06d}", "step-000012"}
    saved = adapter_of(run)
    at_best = load_checkpoint(kept[f"step-{best:06d}"]).tensors
    at_end = load_checkpoint(kept["step-000012"]).tensors
    by_value = {tuple(t.flatten().tolist()) for t in saved.values()}
    assert by_value == {tuple(t.flatten().tolist()) for t in at_best.values()}
    assert by_value != {tuple(t.flatten().tolist()) for t in at_end.values()}


def test_patience_stops_the_run_and_a_resume_finds_it_finished(make_recipe):
    recipe = make_recipe("run", worsens=True, eval={"best_metric": "loss", "patience": 1})
    stopped = train_once(recipe)
    assert stopped["best"]["step"] == stopped["steps"] - 3 < 9
    assert stopped["result"].is_dir()
    again = train_once(recipe, resume="auto")
    assert (again["steps"], again["samples"]) == (stopped["steps"], 0)
    assert again["best"] == stopped["best"]
    # More patience is a reason to go on.
    further = train_once(recipe, "eval.patience=9", resume="auto")
    assert further["steps"] == 12


def test_a_kill_between_two_evaluations_changes_neither_the_best_nor_the_end(make_recipe):
    keys: dict[str, Any] = {
        "eval": {"best_metric": "loss", "patience": 2},
        "train__learning_rate": 0.03,
        "train__keep_checkpoints": 9,
    }
    whole, cut = make_recipe("whole", **keys), make_recipe("cut", **keys)
    expected = train_once(whole)
    train_once(cut)
    # As after a kill: no result, and of the checkpoints only the first.
    for path in sorted((cut.parent / "run/checkpoints").iterdir())[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    got = train_once(cut, resume="auto")
    assert (got["best"], got["steps"]) == (expected["best"], expected["steps"])
    for name, tensor in adapter_of(whole.parent / "run").items():
        assert torch.equal(tensor, adapter_of(cut.parent / "run")[name]), name


def test_a_metric_that_is_not_measured_stops_the_run_at_its_first_evaluation(make_recipe):
    recipe = make_recipe("run", eval={"best_metric": "exactness"})
    with pytest.raises(VlmtuneError, match="exact_match"):
        train_once(recipe)

    # The model before training tells it: no step is lost.
    assert not (recipe.parent / "run" / "checkpoints").exists()


def test_a_resume_by_another_metric_does_not_keep_the_old_ones_best(make_recipe):
    by_loss = {"best_metric": "loss", "patience": 1}
    recipe = make_recipe("run", worsens=True, eval=by_loss)
    stopped = train_once(recipe)
    assert stopped["steps"] < 12
    # Patience with the loss says nothing about another metric.
    other = train_once(recipe, "eval.best_metric=exact_match", "eval.patience=4", resume="auto")
    assert (other["steps"], other["best"]["metric"]) == (12, "exact_match")
    # Without a metric the result is the last step's, also where no step is left to do.
    shutil.rmtree(recipe.parent / "run" / "adapter")
    last = train_once(
        recipe, "eval.best_metric=null", "eval.patience=null", "data.eval=null", resume="auto"
    )
    assert (last["samples"], last["best"]) == (0, None)


def test_going_on_in_another_folder_takes_the_best_so_far_along(make_recipe, tmp_path: Path):
    keys: dict[str, Any] = {
        "eval": {"best_metric": "loss"} | guard(tmp_path / "data" / "train.jsonl"),
        "train__keep_checkpoints": 9,
    }
    recipe = make_recipe("run", worsens=True, **keys)
    expected = train_once(recipe)
    best, end = expected["best"]["step"], expected["steps"]
    assert best < 12, expected["best"]
    checkpoints = recipe.parent / "run" / "checkpoints"
    other = tmp_path / "other"
    got = train_once(recipe, f"output_dir={other}", resume=str(checkpoints / "step-000009"))
    assert (got["best"], got["guard"], got["steps"]) == (expected["best"], expected["guard"], end)
    for name, tensor in adapter_of(recipe.parent / "run").items():
        assert torch.equal(tensor, adapter_of(other)[name]), name
    # The best itself under another name.
    renamed = tmp_path / "kept"
    shutil.copytree(checkpoints / f"step-{best:06d}", renamed)
    fourth = tmp_path / "fourth"
    got = train_once(recipe, f"output_dir={fourth}", resume=str(renamed))
    assert got["best"] == expected["best"]
    # Gone, it cannot become the result: that is said before anything is done.
    shutil.rmtree(checkpoints / f"step-{best:06d}")
    third = tmp_path / "third"
    with pytest.raises(VlmtuneError, match=f"the best step so far, {best}"):
        train_once(recipe, f"output_dir={third}", resume=str(checkpoints / "step-000009"))
    assert not third.exists()


def test_evaluations_after_the_step_to_go_on_from_are_removed(make_recipe):
    recipe = make_recipe("run", train__keep_checkpoints=9)
    train_once(recipe)
    run = recipe.parent / "run"
    train_once(recipe, "train.eval_every=12", resume=str(run / "checkpoints" / "step-000006"))
    names = [path.name for path in sorted((run / "eval").iterdir())]
    assert names == [f"step-{step:06d}" for step in (0, 3, 6, 12)]


def guard(data: Path, **keys: Any) -> dict[str, Any]:
    return {"guard": {"data": str(data), "max_samples": 16, **keys}}


def test_a_guard_that_fell_is_said_and_one_that_held_too(make_recipe, tmp_path: Path):
    # What the base itself answers: trained on other answers at a high rate, it forgets that.
    data = tmp_path / "data" / "train.jsonl"
    first = make_recipe("first", eval={"max_samples": None})
    train_once(first, "train.max_steps=1")
    answers = first.parent / "run" / "eval" / "step-000000" / "predictions.jsonl"
    said = {row["id"]: row["prediction"] for row in map(json.loads, answers.open())}
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = said[row["id"]]
    known = tmp_path / "data" / "known.jsonl"
    known.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, allowed in (("fell", 0.05), ("held", 1.0)):
        recipe = make_recipe(name, eval=guard(known, max_drop=allowed), train__learning_rate=0.01)
        verdict = train_once(recipe)["guard"]
        assert (verdict["metric"], verdict["before"]) == ("exact_match", 1.0)
        assert verdict["has_fallen"] is (name == "fell"), verdict
        assert verdict["drop"] == pytest.approx(1.0 - verdict["after"])
        guarded = values_of(recipe.parent / "run", "guard_exact_match")
        assert list(guarded) == [0, 3, 6, 9, 12]
        assert (guarded[0], guarded[12]) == (1.0, verdict["after"])


def test_a_guard_of_other_data_than_before_training_is_not_compared(make_recipe, tmp_path, caplog):
    guarded = guard(tmp_path / "data" / "train.jsonl")
    recipe = make_recipe("run", eval=guarded, train__keep_checkpoints=2)
    assert train_once(recipe)["guard"] is not None
    for path in recipe.parent.glob("run/checkpoints/step-000012/*"):
        path.unlink()
    with caplog.at_level("WARNING", logger="vlmtune"):
        resumed = train_once(recipe, "eval.guard.max_samples=8", resume="auto")
    assert (resumed["steps"], resumed["guard"]) == (12, None)
    assert "was not measured on its data before training" in caplog.text


def test_a_fallen_guard_is_exit_code_1_with_the_result_saved(make_recipe, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from vlmtune.cli.app import app
    from vlmtune.sessions import train_evaluation

    recipe = make_recipe("run", eval=guard(tmp_path / "data" / "train.jsonl", metric="loss"))
    done = CliRunner().invoke(app, ["train", str(recipe)])
    assert done.exit_code == 2  # the loss is no figure of the guard's answers
    assert not (recipe.parent / "run" / "checkpoints").exists()  # said before the first step
    recipe = make_recipe("two", eval=guard(tmp_path / "data" / "train.jsonl"))
    monkeypatch.setattr(
        train_evaluation,
        "read_figures",
        lambda folder: {"exact_match": 1.0 if folder.name.endswith("000000") else 0.5},
    )
    done = CliRunner().invoke(app, ["train", str(recipe)])
    assert done.exit_code == 1
    assert "forgotten" in done.stdout
    assert (recipe.parent / "run" / "adapter").is_dir()
    # Asked again, a finished run says the same.
    again = CliRunner().invoke(app, ["train", str(recipe), "--resume", "auto"])
    assert again.exit_code == 1
    assert "forgotten" in again.stdout
