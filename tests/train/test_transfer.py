"""On the CPU nothing is pinned, copied or waited for; `test_gpu.py` has the rest."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from tests.train.test_pending import data_of
from vlmtune.errors import VlmtuneError
from vlmtune.train.feed import StepData, loaded
from vlmtune.train.runtime import Arrival, ahead, to_device, to_device_late, to_host

CPU = torch.device("cpu")


class Steps(Dataset[StepData | VlmtuneError]):
    def __getitem__(self, step: int) -> StepData | VlmtuneError:
        return data_of(step, step + 1)


def test_a_batch_is_itself_on_the_cpu():
    batches = data_of(5, 2, 3).micro_batches
    assert [id(b) for b in ahead(batches, CPU)] == [id(b) for b in batches]
    assert to_device(batches[0], CPU) is batches[0]
    assert list(ahead([], CPU)) == []


def test_a_value_on_the_host_is_a_copy():
    value = torch.ones(3)
    there = to_host(value)
    Arrival(CPU).wait()
    value.zero_()
    assert there.tolist() == [1.0, 1.0, 1.0]
    assert not there.is_pinned()
    assert to_device_late([1.0, True], CPU).tolist() == [1.0, 1.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA they are")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_without_cuda_steps_are_not_pinned(num_workers: int, monkeypatch):
    monkeypatch.setattr(StepData, "pin_memory", lambda self: pytest.fail("pinned"))
    steps = list(loaded(Steps(), sampler=range(1, 4), num_workers=num_workers))
    assert [len(step.micro_batches[0].targets) for step in steps] == [1, 2, 3]
    assert not steps[0].micro_batches[0].inputs["input_ids"].is_pinned()
