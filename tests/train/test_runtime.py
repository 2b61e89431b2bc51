from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from accelerate.state import AcceleratorState

from vlmtune.errors import VlmtuneError
from vlmtune.train.runtime import build_accelerator, check_environment, leave_out_autocast


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
        leave_out_autocast(accelerator)
    prepared = accelerator.prepare(torch.nn.Linear(64, 64))
    prepared.load_state_dict(linear.state_dict())
    with accelerator.autocast():
        inside = linear(rows)
    AcceleratorState._reset_state(reset_partial_state=True)
    for found in (prepared(rows), inside.float()):
        assert (inside.dtype == torch.float32) == left_out
        assert torch.allclose(found, exact if left_out else rounded, atol=1e-5)
