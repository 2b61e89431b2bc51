"""What only a CUDA device shows; not run on the machines that this was written on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.training import metrics_of, train_once, write_recipe
from vlmtune.train.optim import build_optimizer

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
