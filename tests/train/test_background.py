from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.train.test_checkpoint import a_checkpoint
from vlmtune import files
from vlmtune.errors import VlmtuneError
from vlmtune.train import checkpoint as background
from vlmtune.train.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    complete_checkpoints,
    copied,
    load_checkpoint,
    state_bytes,
)


@pytest.fixture
def held(monkeypatch):
    """The disk takes nothing until the event is set."""
    let_go = threading.Event()
    sync = files.sync_folder

    def slow(folder: Path) -> None:
        assert let_go.wait(60)
        sync(folder)

    monkeypatch.setattr(files, "sync_folder", slow)
    return let_go


def change(checkpoint: Checkpoint) -> None:
    """What the next step does to the tensors and to the optimizer's state, in place."""
    checkpoint.tensors["w"].fill_(99.0)
    for moments in checkpoint.optimizer["optimizer"]["state"].values():
        moments["exp_avg"].fill_(99.0)
        moments["step"].fill_(99.0)


def test_what_happens_after_the_save_is_not_in_the_file(tmp_path: Path, held):
    saved, expected = a_checkpoint(7, 0.1), a_checkpoint(7, 0.1)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        writer.save(saved)
        change(saved)
        assert complete_checkpoints(tmp_path) == []  # training goes on meanwhile
        held.set()
    loaded = load_checkpoint(tmp_path / "step-000007")
    assert loaded.state == expected.state
    assert torch.equal(loaded.tensors["w"], expected.tensors["w"])
    assert str(loaded.optimizer) == str(expected.optimizer)


def test_without_the_copy_the_next_step_would_be_in_the_file(tmp_path: Path, monkeypatch):
    """The wrong variant; the thread waits before it looks at a tensor, as a busy one may."""
    changed = threading.Event()
    save = background.save_checkpoint

    def defer_sync(*arguments, **settings):
        assert changed.wait(60)
        return save(*arguments, **settings)

    monkeypatch.setattr(background, "save_checkpoint", defer_sync)
    for copy, expected in ((copied, 0.1), (lambda checkpoint: checkpoint, 99.0)):
        monkeypatch.setattr(background, "copied", copy)
        changed.clear()
        saved = a_checkpoint(7, 0.1)
        saved.tensors["w"] = saved.tensors["w"].clone()
        first = saved.tensors["w"][0].item()
        with CheckpointWriter(tmp_path, keep=2) as writer:
            writer.save(saved)
            change(saved)
            changed.set()
        found = load_checkpoint(tmp_path / "step-000007").tensors["w"][0].item()
        assert found == (first if expected != 99.0 else 99.0)


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, held):
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(a_checkpoint(5))
        threading.Timer(0.2, held.set).start()
        writer.save(a_checkpoint(10))
        assert [p.name for p in complete_checkpoints(tmp_path)][0] == "step-000005"
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000010"]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_at_the_next_look_and_loses_nothing(tmp_path: Path, monkeypatch):
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(a_checkpoint(5))
        writer.wait()
        monkeypatch.setattr(files, "sync_folder", full)
        writer.save(a_checkpoint(10))
        end = time.monotonic() + 60
        with pytest.raises(VlmtuneError, match="step 10 could not be written.*No space left"):
            while time.monotonic() < end:
                writer.check()
        writer.check()  # told once
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def test_a_full_disk_is_told_at_the_latest_at_the_end(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(files, "sync_folder", full)
    told = pytest.raises(VlmtuneError, match="step 10 could not be written")
    with told, CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(a_checkpoint(10))


def test_an_error_of_the_run_comes_first_and_the_write_is_finished(tmp_path: Path, held):
    told = pytest.raises(VlmtuneError, match="the loss")
    with told, CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(a_checkpoint(10))
        threading.Timer(0.2, held.set).start()
        raise VlmtuneError("step 11: the loss is not finite")
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-000010"]


def test_a_state_too_large_to_copy_is_written_at_once_and_said_once(
    tmp_path: Path, monkeypatch, caplog, held
):
    class Memory:
        available = 161

    monkeypatch.setattr(background.psutil, "virtual_memory", lambda: Memory)
    assert state_bytes(a_checkpoint(5)) == 3 * 3 * 4 + 4  # the tensor, two moments, the step
    with caplog.at_level("INFO", logger="vlmtune"), CheckpointWriter(tmp_path, keep=5) as writer:
        writer.save(a_checkpoint(5))
        assert not complete_checkpoints(tmp_path) and not caplog.text
        held.set()
        Memory.available = 159
        for step in (10, 15):
            writer.save(a_checkpoint(step))
            assert load_checkpoint(tmp_path / f"step-{step:06d}").state.step == step
    assert caplog.text.count("training waits") == 1


def test_a_tensor_that_occurs_twice_is_copied_once():
    checkpoint = a_checkpoint(5)
    table = torch.ones(4)
    checkpoint.optimizer["tables"] = [{"table": table}, {"table": table}]
    one, two = (entry["table"] for entry in copied(checkpoint).optimizer["tables"])
    assert one is two and one is not table and torch.equal(one, table)


KILLED = """
import sys, os, signal, threading
from pathlib import Path
from tests.train.test_checkpoint import a_checkpoint
from vlmtune import files
from vlmtune.train import checkpoint as checkpoints
from vlmtune.train.checkpoint import CheckpointWriter
folder = Path(sys.argv[1])
with CheckpointWriter(folder, keep=1) as writer:
    writer.save(a_checkpoint(5))
    writer.wait()
    reached = threading.Event()
    name = sys.argv[2]
    def stuck(*_):
        reached.set()
        threading.Event().wait()
    home = {"rename": Path, "sync_folder": files}.get(name, checkpoints)
    setattr(home, name, stuck)
    writer.save(a_checkpoint(10))
    reached.wait()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["save_file", "sync_folder", "rename", "complete_checkpoints"])
def test_a_kill_at_any_moment_leaves_complete_checkpoints(tmp_path: Path, moment: str):
    """Before the tensors are written, before the sync, before the rename, before the pruning."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), moment], env=dict(os.environ), timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    found = [p.name for p in complete_checkpoints(tmp_path)]
    after_rename = moment == "complete_checkpoints"
    assert found == ["step-000005"] + ["step-000010"] * after_rename
    for name in found:
        assert load_checkpoint(tmp_path / name).state.step == int(name[-2:])
