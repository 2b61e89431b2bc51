from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import pytest
import torch

from vlmtune import files
from vlmtune.errors import VlmtuneError
from vlmtune.train.checkpoint import (
    Best,
    Checkpoint,
    CheckpointMeta,
    check_fingerprint,
    complete_checkpoints,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)


def a_checkpoint(step: int, value: float = 1.0) -> Checkpoint:
    parameter = torch.nn.Parameter(torch.full((3,), value))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    return Checkpoint(
        CheckpointMeta(step, 1, {"seed": 1}, []),
        {"w": parameter.detach()},
        {"optimizer": optimizer.state_dict()},
        [random_state()],
    )


def test_what_is_saved_comes_back_bitwise(tmp_path: Path):
    saved = a_checkpoint(7, 0.1)
    path = save_checkpoint(tmp_path, saved, keep=2)
    loaded = load_checkpoint(path)
    assert path.name == "step-000007"
    assert loaded.state == saved.state
    assert torch.equal(loaded.tensors["w"], saved.tensors["w"])
    assert str(loaded.optimizer) == str(saved.optimizer)
    draws = torch.rand(3)
    restore_random_state(loaded.rng[0])
    assert torch.equal(torch.rand(3), draws)


def test_only_the_newest_are_kept(tmp_path: Path):
    for step in (5, 10, 15, 999_999, 1_000_000):
        save_checkpoint(tmp_path, a_checkpoint(step), keep=2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_the_best_of_each_kept_checkpoint_is_kept(tmp_path: Path):
    def save(step: int, best: int) -> list[str]:
        checkpoint = a_checkpoint(step)
        checkpoint.state = dataclasses.replace(checkpoint.state, best=Best("loss", best, 1.0))
        save_checkpoint(tmp_path, checkpoint, keep=2)
        return [p.name.removeprefix("step-0000") for p in complete_checkpoints(tmp_path)]

    assert [save(2, 2), save(4, 2), save(6, 2)] == [["02"], ["02", "04"], ["02", "04", "06"]]
    # 8 is better, but whoever goes back to 6 needs 2.
    assert save(8, 8) == ["02", "06", "08"]
    assert save(10, 8) == ["08", "10"]


def test_a_half_written_checkpoint_is_not_found_and_is_cleared(tmp_path: Path):
    save_checkpoint(tmp_path, a_checkpoint(5), keep=2)
    (tmp_path / ".writing-step-000010").mkdir()
    (tmp_path / ".writing-step-000010" / "state.json").write_text("{}")
    (tmp_path / "step-000020").mkdir()  # no state.json: someone else's folder
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000005"]
    save_checkpoint(tmp_path, a_checkpoint(15), keep=2)
    assert not (tmp_path / ".writing-step-000010").exists()


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path: Path, monkeypatch):
    save_checkpoint(tmp_path, a_checkpoint(5), keep=2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync_folder", full)
    with pytest.raises(VlmtuneError, match="step 10 could not be written.*No space left"):
        save_checkpoint(tmp_path, a_checkpoint(10), keep=1)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000005"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(VlmtuneError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path)


def test_a_changed_recipe_key_is_named(tmp_path: Path):
    check_fingerprint({"rank": 8}, {"rank": 8}, path=tmp_path)
    with pytest.raises(VlmtuneError, match="rank changed.*8 -> 16"):
        check_fingerprint({"rank": 8, "seed": 1}, {"rank": 16, "seed": 1}, path=tmp_path)


def test_state_is_plain_json(tmp_path: Path):
    path = save_checkpoint(tmp_path, a_checkpoint(5), keep=2)
    assert json.loads((path / "state.json").read_text())["step"] == 5
