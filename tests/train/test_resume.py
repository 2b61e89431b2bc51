"""Resumed equals uninterrupted, bit for bit, from a checkpoint that a kill -9 left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.train.training import METHODS, adapter_of, metrics_of, train_once, write_recipe
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.load import load_recipe
from vlmtune.train.checkpoint import (
    check_fingerprint,
    complete_checkpoints,
    fingerprint_of,
)
from vlmtune.train.run_folder import choose_start, drop_records, set_aside


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_vlm: Path, sample_data: Path):
    def make(name: str, **keys: object) -> Path:
        keys = {"dropout": 0.1} | keys
        data = sample_data / "train.jsonl"
        return write_recipe(tmp_path / name, tiny_vlm=tiny_vlm, data=data, **keys)

    return make


def start_process(recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-m", "vlmtune", "train", str(recipe), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics_of_live(run)) >= step, process)


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        if is_so():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("the run did not get going")


def metrics_of_live(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("method", list(METHODS))
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(make_recipe, method: str):
    whole, killed = (
        make_recipe("whole", **METHODS[method]),
        make_recipe("killed", **METHODS[method]),
    )
    train_once(whole)
    process = start_process(killed)
    run = killed.parent / "run"
    wait_for_step(run, 3, process)  # saved after 3, beside the steps that follow
    wait_until(lambda: bool(complete_checkpoints(run / "checkpoints")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "adapter").exists()
    train_once(killed, resume="auto")
    expected, resumed = adapter_of(whole.parent / "run"), adapter_of(run)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)
    assert [m["step"] for m in metrics_of(run)] == list(range(1, 13))
    assert [m["loss"] for m in metrics_of(run)] == [
        m["loss"] for m in metrics_of(whole.parent / "run")
    ]


@pytest.mark.parametrize("lost", ["optimizer", "rng"])
def test_a_resume_that_lost_a_part_of_its_state_differs(make_recipe, lost: str):
    recipe = make_recipe("run", **METHODS["lora"], train__keep_checkpoints=10)
    train_once(recipe)
    run = recipe.parent / "run"
    expected = adapter_of(run)
    (checkpoint,) = [p for p in complete_checkpoints(run / "checkpoints") if p.name[-1] == "6"]
    if lost == "optimizer":
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        for moments in state["optimizer"]["state"].values():
            moments["exp_avg"].zero_()
        torch.save(state, checkpoint / "optimizer.pt")
    else:
        state = torch.load(checkpoint / "rng.pt", weights_only=True)
        state[0]["torch"] = torch.Generator().manual_seed(7).get_state()
        torch.save(state, checkpoint / "rng.pt")
    train_once(recipe, resume=str(checkpoint))
    assert any(not torch.equal(expected[k], v) for k, v in adapter_of(run).items())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_saves_and_exits(make_recipe, number: int, code: int):
    recipe = make_recipe("run", rank=4, train__max_steps=400, train__save_every=400)
    process = start_process(recipe)
    run = recipe.parent / "run"
    wait_for_step(run, 3, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    (saved,) = complete_checkpoints(run / "checkpoints")
    assert int(saved.name.removeprefix("step-")) == metrics_of(run)[-1]["step"]
    assert "--resume auto" in stderr
    assert "Traceback" not in stderr


def test_an_occupied_folder_offers_the_ways_on(make_recipe):
    recipe = make_recipe("run", rank=4, train__max_steps=2)
    train_once(recipe)
    with pytest.raises(
        VlmtuneError, match="occupied.*a finished run.*--resume auto.*--resume never"
    ):
        train_once(recipe)
    before = (recipe.parent / "run" / "metrics.jsonl").read_text()
    again = train_once(recipe, resume="auto")
    assert again["samples"] == 0
    assert (recipe.parent / "run" / "metrics.jsonl").read_text() == before
    train_once(recipe, resume="never")
    assert (recipe.parent / "run.previous-1" / "adapter").is_dir()
    assert (recipe.parent / "run" / "adapter").is_dir()


def test_a_run_that_ended_before_its_first_checkpoint_is_replaced(make_recipe):
    recipe = make_recipe("run", rank=4, train__max_steps=400, train__save_every=400)
    run = recipe.parent / "run"
    process = start_process(recipe)
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run / "eval" / "step-000000").mkdir(parents=True)
    (run / "summary.json").write_text("of the killed run")
    (run / "notes.txt").write_text("a person's")
    old = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    process = start_process(recipe, "train.max_steps=2", "train.save_every=2")
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert "replacing a run that ended before its first checkpoint" in stderr
    assert [m["step"] for m in metrics_of(run)] == [1, 2]
    assert (run / "adapter").is_dir() and not list(run.glob("eval/*"))
    assert (run / "notes.txt").read_text() == "a person's"
    assert not [p for p in old if p.exists() and "tensorboard" in str(p)]
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    with pytest.raises(VlmtuneError, match="occupied.*a finished run"):
        train_once(recipe)


@pytest.mark.parametrize(
    "work", ["checkpoints/step-000004", "checkpoints/superseded-step-000004", "superseded-adapter"]
)
def test_what_took_training_is_not_replaced(tmp_path: Path, work: str):
    for name in ("recipe.resolved.yaml", "environment.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoints" / ".writing-step-000004").mkdir(parents=True)
    assert choose_start(tmp_path, None) is None
    (tmp_path / work).mkdir(parents=True)
    for resume in (None, "auto"):
        with pytest.raises(VlmtuneError, match="without a complete checkpoint.*--resume never"):
            choose_start(tmp_path, resume)
    assert not drop_records(tmp_path)
    assert (tmp_path / "metrics.jsonl").exists()
    assert choose_start(tmp_path, "never") is None


@pytest.mark.parametrize("missing", ["recipe.resolved.yaml", "environment.json"])
def test_a_folder_without_a_runs_records_is_not_renamed(tmp_path: Path, missing: str):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recipe.resolved.yaml", "environment.json"):
        (folder / name).write_text("{}")
    (folder / missing).rename(folder / "photo.jpg")
    with pytest.raises(VlmtuneError, match="no run wrote it.*another output_dir"):
        choose_start(folder, "never")
    assert set_aside(folder) is None and not drop_records(folder)
    (folder / "photo.jpg").rename(folder / missing)
    assert choose_start(folder, "never") is None
    assert set_aside(folder) == tmp_path / "run.previous-1"


def test_a_changed_recipe_is_not_resumed(make_recipe):
    recipe = make_recipe("run", rank=4, train__max_steps=3)
    train_once(recipe)
    with pytest.raises(VlmtuneError, match=r"train.learning_rate changed.*0.001 -> 0.002"):
        train_once(recipe, "train.learning_rate=2e-3", resume="auto")


def test_keys_that_change_no_step_are_not_in_the_fingerprint(make_recipe):
    recipe = make_recipe("run")

    def fingerprint(*overrides: str) -> dict[str, object]:
        return fingerprint_of(load_recipe(recipe, overrides).recipe, {})

    one = fingerprint()
    for free in ("output_dir=other", "data.num_workers=1", "eval.batch_size=3", "data.cache=disk"):
        assert fingerprint(free) == one
    with pytest.raises(VlmtuneError, match="data.train_on changed"):
        check_fingerprint(one, fingerprint("data.train_on=last_turn"), path=Path("run"))
    contrastive = fingerprint("objective=contrastive", "train.batch_size=2")
    with pytest.raises(VlmtuneError, match="objective"):
        check_fingerprint(one, contrastive, path=Path("run"))
    assert "eval.embedding_prompt" in contrastive.keys() - one.keys()


def test_a_bad_target_leaves_no_folder_and_moves_no_run(make_recipe):
    recipe = make_recipe("run", rank=4, train__max_steps=1)
    wrong = "lora_target=[q_porj]"
    with pytest.raises(VlmtuneError, match="q_porj"):
        train_once(recipe, wrong)
    assert not (recipe.parent / "run").exists()
    train_once(recipe)
    with pytest.raises(VlmtuneError, match="q_porj"):
        train_once(recipe, wrong, resume="never")
    assert not (recipe.parent / "run.previous-1").exists()


def test_going_back_to_an_older_checkpoint_sets_the_newer_ones_aside(make_recipe):
    recipe = make_recipe("run", rank=4, train__max_steps=6)
    train_once(recipe)
    run = recipe.parent / "run"
    expected = adapter_of(run)
    older, newer = complete_checkpoints(run / "checkpoints")
    assert (older.name, newer.name) == ("step-000003", "step-000006")
    train_once(recipe, "train.keep_checkpoints=1", resume=str(older))
    assert [p.name for p in complete_checkpoints(run / "checkpoints")] == ["step-000006"]
    assert (run / "checkpoints" / "superseded-step-000006").is_dir()
    assert (run / "superseded-adapter").is_dir()
    assert all(torch.equal(expected[k], v) for k, v in adapter_of(run).items())


def test_a_kill_between_the_last_checkpoint_and_the_result_is_mended(make_recipe):
    recipe = make_recipe("run", rank=4, train__max_steps=3)
    train_once(recipe)
    run = recipe.parent / "run"
    expected = adapter_of(run)
    (run / "adapter").rename(run / ".writing-adapter")
    summary = train_once(recipe, resume="auto")
    assert summary["steps"] == 3 and summary["samples"] == 0
    # No step, no loss: null, which every reader of JSON knows.
    assert summary["loss"] is None
    assert json.loads((run / "summary.json").read_text())["loss"] is None
    assert all(torch.equal(expected[k], v) for k, v in adapter_of(run).items())
