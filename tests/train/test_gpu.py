"""What only a CUDA device shows; not run on the machines that this was written on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.test_pending import Scores, a_step
from tests.train.test_transfer import Steps
from tests.train.training import metrics_of, train_once, write_recipe
from vlmtune.train.checkpoint import Checkpoint, CheckpointMeta, copied
from vlmtune.train.feed import load_steps
from vlmtune.train.optim import build_optimizer
from vlmtune.train.runtime import prefetch_to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kind", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_state_is_paged(kind: str):
    parameter = torch.nn.Parameter(torch.ones(512, 512, device="cuda"))
    groups = [{"params": [parameter], "part": "language", "lr": 0.1, "peak_lr": 0.1}]
    optimizer = build_optimizer(groups, kind=kind, device=torch.device("cuda"))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.is_paged
    assert getattr(optimizer.state[parameter]["state1"], "is_paged", False)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("bits", [4, 16])
def test_training_lowers_the_loss(
    tmp_path: Path, tiny_vlm: Path, sample_data: Path, precision: str, bits: int
):
    recipe = write_recipe(
        tmp_path,
        tiny_vlm=tiny_vlm,
        data=sample_data / "train.jsonl",
        quantization_bit=bits,
        train__precision=precision,
        train__optimizer="paged_adamw_8bit",
        train__gradient_checkpointing=True,
        train__max_steps=40,
    )
    summary = train_once(recipe)
    losses = [m["loss"] for m in metrics_of(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    assert 0 < summary["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory


def test_batches_arrive_pinned_and_one_ahead():
    (step,) = load_steps(Steps(), sampler=range(3, 4), num_workers=0)
    assert all(batch.inputs["input_ids"].is_pinned() for batch in step.micro_batches)
    cuda = torch.device("cuda")
    for batch, expected in zip(
        prefetch_to_device(step.micro_batches, cuda), step.micro_batches, strict=True
    ):
        assert batch.targets.device.type == "cuda"
        assert torch.equal(batch.targets.cpu(), expected.targets)
        assert torch.equal(batch.inputs["input_ids"].cpu(), expected.inputs["input_ids"])


def test_a_late_step_does_not_wait_for_the_device():
    model = Scores().cuda()
    a_step(model, defer_sync=True).read()  # the first makes what later ones reuse
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = a_step(model, defer_sync=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pending.read().num_terms == 7


def test_a_checkpoint_is_copied_to_pinned_memory():
    tensors = {"w": torch.arange(5.0, device="cuda")}
    saved = copied(Checkpoint(CheckpointMeta(1, 1, {}, []), tensors, {}, []))
    tensors["w"].zero_()
    assert saved.tensors["w"].is_pinned() and saved.tensors["w"].tolist() == [0, 1, 2, 3, 4]
