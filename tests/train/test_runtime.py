from __future__ import annotations

import pytest

from vlmtune.errors import VlmtuneError
from vlmtune.train.runtime import check_environment


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
