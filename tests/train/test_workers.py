"""The processes that make steps ahead of the loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import get_worker_info

from tests.train.training import copy_sample, metrics_of, train_once, write_recipe
from vlmtune.errors import VlmtuneError
from vlmtune.train.feed import StepBuilder, lost_workers_told


@pytest.mark.parametrize("streaming", [False, True])
def test_one_that_is_killed_is_an_error_that_says_what_to_do_and_the_run_goes_on(
    tmp_path: Path, tiny_vlm: Path, sample_data: Path, monkeypatch, streaming: bool
):
    data = copy_sample(sample_data, tmp_path / "data", keep=12)
    keys = {"data__num_workers": 1, "data__streaming": streaming, "lora_target": ["q_proj"]}
    recipe = write_recipe(
        tmp_path, tiny_vlm=tiny_vlm, data=data, **keys, train__max_steps=6, train__save_every=2
    )
    build, num_built = StepBuilder.build, 0

    def killed(self, *arguments, **options):
        nonlocal num_built
        num_built += 1
        if get_worker_info() is not None and num_built == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return build(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StepBuilder, "build", killed)
        with pytest.raises(VlmtuneError, match=r"ended from outside.*lower data\.num_workers"):
            train_once(recipe)
    assert train_once(recipe, resume="auto")["steps"] == 6
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, 7))


def test_other_errors_of_torch_stay_as_they_are():
    with pytest.raises(RuntimeError, match="shapes do not match"), lost_workers_told():
        raise RuntimeError("shapes do not match")


MANY_TENSORS = """
import resource, torch
from torch.utils.data import Dataset
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
from vlmtune.train.feed import loaded
class Steps(Dataset):
    def __getitem__(self, step):
        return [torch.ones(1) for _ in range(200)]
kept = list(loaded(Steps(), sampler=range(3), num_workers=1))
assert sum(len(step) for step in kept) == 600
"""


def test_a_step_may_hold_more_tensors_than_files_may_be_open_at_first():
    # Where the limit is not raised it waits for ever.
    done = subprocess.run(
        [sys.executable, "-c", MANY_TENSORS], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_too_many_open_files_are_told_as_such():
    told = "too many files are open.*ulimit -n"
    with pytest.raises(VlmtuneError, match=told), lost_workers_told():
        raise RuntimeError("received 0 items of ancdata")
    with pytest.raises(RuntimeError, match="something else"), lost_workers_told():
        raise RuntimeError("something else")
