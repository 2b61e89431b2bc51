"""On the CPU nothing is pinned, copied or waited for; `test_gpu.py` has the rest."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from tests.train.test_pending import data_of
from vlmtune.errors import VlmtuneError
from vlmtune.train.feed import StepBatch, load_steps
from vlmtune.train.runtime import CudaEvent, prefetch_to_device, to_device, to_device_async, to_host

CPU = torch.device("cpu")


class Steps(Dataset[StepBatch | VlmtuneError]):
    def __getitem__(self, step: int) -> StepBatch | VlmtuneError:
        return data_of(step, step + 1)


def test_a_batch_is_itself_on_the_cpu():
    batches = data_of(5, 2, 3).micro_batches
    assert [id(b) for b in prefetch_to_device(batches, CPU)] == [id(b) for b in batches]
    assert to_device(batches[0], CPU) is batches[0]
    assert list(prefetch_to_device([], CPU)) == []


def test_a_value_on_the_host_is_a_copy():
    value = torch.ones(3)
    there = to_host(value)
    CudaEvent(CPU).wait()
    value.zero_()
    assert there.tolist() == [1.0, 1.0, 1.0]
    assert not there.is_pinned()
    assert to_device_async([1.0, True], CPU).tolist() == [1.0, 1.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA they are")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_without_cuda_steps_are_not_pinned(num_workers: int, monkeypatch):
    monkeypatch.setattr(StepBatch, "pin_memory", lambda self: pytest.fail("pinned"))
    steps = list(load_steps(Steps(), sampler=range(1, 4), num_workers=num_workers))
    assert [len(step.micro_batches[0].targets) for step in steps] == [1, 2, 3]
    assert not steps[0].micro_batches[0].inputs["input_ids"].is_pinned()
