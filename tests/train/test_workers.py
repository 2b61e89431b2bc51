"""The processes that make steps ahead of the loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.data import get_worker_info

from tests.train.training import copy_sample, metrics_of, train_once, write_recipe
from vlmtune.data.order import Order
from vlmtune.data.types import Source
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.preflight.rows import RowSettings, check_rows
from vlmtune.train.feed import StepBuilder, StepDataset, steps_from, translate_worker_errors


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
        with pytest.raises(VlmtuneError, match=r"was killed.*lower data\.num_workers"):
            train_once(recipe)
    assert train_once(recipe, resume="auto")["steps"] == 6
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, 7))


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def left() -> None:
    os._exit(3)


def raises(error: Exception):
    def fails() -> None:
        raise error

    return fails


RAISED = [
    RuntimeError("the DataLoader worker has a wrong shape, 0 items of ancdata in it"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal, says the row"),
    ValueError("not a picture"),
    KeyError("image"),
    MemoryError("no room for the picture"),
]


def told_in_training(fails) -> None:
    """Make a step in a worker process that `fails`."""

    class Builder:
        settings = SimpleNamespace(batch_size=1)

        def build(self, *_, **__):
            fails()

    dataset = StepDataset([], Builder(), order=Order.uniform(0, 4), epochs=None)
    with translate_worker_errors():
        list(steps_from(dataset, 1, 2, num_workers=1))


def told_in_the_check(fails) -> None:
    """Look at a row in a worker process that `fails`."""

    class Row:
        id, source = "a", Source("a.jsonl", 1)

        def conversation(self):
            fails()

    list(check_rows(lambda: [Row()], RowSettings(None, 100), num_workers=1))


WHERE = pytest.mark.parametrize("told", [told_in_training, told_in_the_check])


@WHERE
@pytest.mark.parametrize("fails", [killed, left])
def test_only_a_worker_that_is_gone_was_ended_from_outside(told, fails):
    with pytest.raises(VlmtuneError, match=r"was killed.*worker \(pid.*memory may have run out"):
        told(fails)


@WHERE
@pytest.mark.parametrize("error", RAISED, ids=lambda error: str(error)[:20])
def test_what_a_worker_raises_keeps_its_kind_its_words_and_its_traceback(told, error: Exception):
    with pytest.raises(type(error)) as raised:
        told(raises(error))
    text = str(raised.value)
    assert f"Caught {type(error).__name__} in DataLoader worker process 0" in text
    assert str(error) in text and "in fails\n" in text
    assert "memory may have run out" not in text


@WHERE
def test_an_error_of_the_users_comes_as_it_was_raised_with_its_traceback_as_a_note(told):
    error = VlmtuneError("the shard is damaged", file="a.tar", line=7, do="copy it again")
    with pytest.raises(VlmtuneError) as raised:
        told(raises(error))
    assert str(raised.value) == str(error) == "a.tar:7: the shard is damaged; do: copy it again"
    shown = "".join(traceback.format_exception(raised.value))
    assert "in fails\n" in shown, "--debug prints this"


def test_a_bad_sample_of_training_stays_one():
    with pytest.raises(SampleError) as raised:
        told_in_training(raises(SampleError("no picture", file="a.jsonl", line=3)))
    assert str(raised.value) == "a.jsonl:3: no picture"


def test_other_errors_of_torch_stay_as_they_are():
    with pytest.raises(RuntimeError, match="shapes do not match"), translate_worker_errors():
        raise RuntimeError("shapes do not match")


MANY_TENSORS = """
import resource, torch
from torch.utils.data import Dataset
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
from vlmtune.train.feed import load_steps
class Steps(Dataset):
    def __getitem__(self, step):
        return [torch.ones(1) for _ in range(200)]
kept = list(load_steps(Steps(), sampler=range(3), num_workers=1))
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
    with pytest.raises(VlmtuneError, match=told), translate_worker_errors():
        raise RuntimeError("received 0 items of ancdata")
    with pytest.raises(VlmtuneError, match=told), translate_worker_errors():
        raise RuntimeError("Too many open files. Communication with the workers is no longer …")
    with pytest.raises(RuntimeError, match="something else"), translate_worker_errors():
        raise RuntimeError("something else")
