from __future__ import annotations

import math

import pytest
import torch

from vlmtune.recipe.schema import TrainSection
from vlmtune.train.optim import (
    BETAS,
    EPS,
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
    resolve_count,
    set_learning_rate,
)


def factors(schedule: str, total: int = 10, warmup: int = 2) -> list[float]:
    return [
        learning_rate_factor(s, total_steps=total, warmup_steps=warmup, schedule=schedule)
        for s in range(1, total + 1)
    ]


def test_linear_schedule_by_hand():
    assert factors("linear") == pytest.approx(
        [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )


def test_cosine_schedule_by_hand():
    expected = [1 / 3, 2 / 3] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert factors("cosine") == pytest.approx(expected)


def test_constant_schedule_stays_at_the_peak_after_warm_up():
    assert factors("constant") == pytest.approx([1 / 3, 2 / 3] + [1.0] * 8)


def test_every_step_learns():
    for schedule in ("constant", "linear", "cosine"):
        assert min(factors(schedule, total=3, warmup=0)) > 0


@pytest.mark.parametrize(
    ("value", "whole", "steps"),
    [(0.1, False, 10), (1, False, 1), (25, False, 25), (0.0, False, 0), (0.25, True, 25)]
    + [(1.0, True, 100), (2, True, 2), (0.001, True, 1)],
)
def test_fractions_and_counts(value: float, whole: bool, steps: int):
    assert resolve_count(value, 100, whole=whole) == steps


def test_parts_get_their_own_rate_and_vectors_no_decay():
    named = {
        "v.weight": torch.nn.Parameter(torch.zeros(2, 2)),
        "l.weight": torch.nn.Parameter(torch.zeros(2, 2)),
        "l.bias": torch.nn.Parameter(torch.zeros(2)),
        "l.kept": torch.nn.Parameter(torch.zeros(2, 2)),
    }
    section = TrainSection(
        learning_rate=1e-3, weight_decay=0.1, part_learning_rates={"vision": 1e-4}
    )
    groups = parameter_groups(
        named,
        part_of_name={n: "vision" if n[0] == "v" else "language" for n in named},
        section=section,
        no_decay={"l.kept"},
    )
    found = {(g["part"], g["weight_decay"]): (g["lr"], len(g["params"])) for g in groups}
    assert found == {
        ("vision", 0.1): (1e-4, 1),
        ("language", 0.1): (1e-3, 1),
        ("language", 0.0): (1e-3, 2),
    }


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_steps_on_a_cpu(kind: str):
    parameter = torch.nn.Parameter(torch.ones(64, 128))
    groups = [
        {"params": [parameter], "part": "language", "lr": 0.1, "peak_lr": 0.1, "weight_decay": 0.0}
    ]
    optimizer = build_optimizer(groups, kind=kind, device=torch.device("cpu"))
    assert set_learning_rate(optimizer, 0.5) == {"language": 0.05}
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Adam's first step is the learning rate, whatever the gradient's size.
    assert torch.allclose(parameter, torch.full_like(parameter, 0.95), atol=1e-4)


def adamw_by_hand(start: torch.Tensor, gradients: torch.Tensor, *, coupled: bool) -> torch.Tensor:
    """Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2, in float64; `coupled`: with the
    decay as a part of the gradient."""
    weight, m, v = start.double(), torch.zeros(()), torch.zeros(())
    for step, gradient in enumerate(gradients.double(), 1):
        decay = 0.1 * weight
        gradient = gradient + decay if coupled else gradient
        m = BETAS[0] * m + (1 - BETAS[0]) * gradient
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
        scaled = v / (1 - BETAS[1] ** step)
        update = m / (1 - BETAS[0] ** step) / (scaled.sqrt() + EPS)
        weight = weight - 0.01 * (update + (0 if coupled else decay))
    return weight.float()


def test_adamw_is_fused_and_what_the_paper_says():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator)
    gradients = torch.randn(20, 7, 5, generator=generator)
    parameter = torch.nn.Parameter(start.clone())
    group = {"params": [parameter], "part": "language", "lr": 0.01, "peak_lr": 0.01}
    groups = [group | {"weight_decay": 0.1}]
    optimizer = build_optimizer(groups, kind="adamw", device=torch.device("cpu"))
    assert optimizer.param_groups[0]["fused"]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(parameter, adamw_by_hand(start, gradients, coupled=False), atol=1e-6)
    wrong = adamw_by_hand(start, gradients, coupled=True)
    assert not torch.allclose(parameter, wrong, atol=1e-3)
