from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.train.training import train_once, write_recipe
from vlmtune.errors import ErrorGroup, VlmtuneError
from vlmtune.sessions import train as train_session
from vlmtune.train.runtime import build_accelerator, check_environment, disable_autocast


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_a_launcher_setting_that_would_override_the_recipe_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(VlmtuneError, match=name):
        check_environment("bf16")


def test_what_accelerate_launch_always_sets_is_fine(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    check_environment("bf16")


@pytest.mark.parametrize("left_out", [False, True])
def test_a_model_that_needs_no_autocast_computes_in_its_own_dtypes(left_out: bool):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = build_accelerator("bf16")
    linear, rows = torch.nn.Linear(64, 64), torch.randn(8, 64)
    exact, rounded = linear(rows), deepcopy(linear).bfloat16()(rows.bfloat16()).float()
    assert (exact - rounded).abs().max() > 1e-3
    if left_out:
        disable_autocast(accelerator)
    prepared = accelerator.prepare(torch.nn.Linear(64, 64))
    prepared.load_state_dict(linear.state_dict())
    with accelerator.autocast():
        inside = linear(rows)
    AcceleratorState._reset_state(reset_partial_state=True)
    for found in (prepared(rows), inside.float()):
        assert (inside.dtype == torch.float32) == left_out
        assert torch.allclose(found, exact if left_out else rounded, atol=1e-5)


def test_bf16_on_a_gpu_without_it_is_refused_before_the_model_loads(
    tmp_path: Path, tiny_vlm: Path, sample_data: Path, monkeypatch
):
    AcceleratorState._reset_state(reset_partial_state=True)
    data = sample_data / "train.jsonl"
    recipe = write_recipe(
        tmp_path, tiny_vlm=tiny_vlm, data=data, rank=4, quantization_bit=4, train__precision="bf16"
    )
    loaded: list[object] = []
    monkeypatch.setattr(train_session, "load_model", lambda *arguments: loaded.append(arguments))
    monkeypatch.setattr(train_session, "capability_of", lambda device: (7, 5))
    with pytest.raises(ErrorGroup) as refused:
        train_once(recipe)
    told = str(refused.value).splitlines()
    assert len(told) == 2 and not loaded
    assert "set train.precision=fp16" in told[0]
    assert "set quantization.compute_dtype=float16" in told[1]
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(train_session, "capability_of", lambda device: (8, 0))
    with pytest.raises(AttributeError):  # no model: this far it comes
        train_once(recipe)
    assert loaded
    AcceleratorState._reset_state(reset_partial_state=True)
