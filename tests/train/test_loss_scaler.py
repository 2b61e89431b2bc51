"""fp16's loss scaler, on a CPU: what it throws away says nothing, what it keeps is unscaled."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from tests.train.test_pending import NoAdapter, Scores, data_of
from vlmtune.data.types import Batch
from vlmtune.models.adapters.adalora import AdaLoraAdapter, BudgetSchedule, RankAllocator, Triplets
from vlmtune.models.adapters.base import Adapter
from vlmtune.train.feed import StepBatch
from vlmtune.train.optim import build_optimizer
from vlmtune.train.runtime import build_accelerator
from vlmtune.train.state import Objective, TrainState
from vlmtune.train.step import NextToken, train_step
from vlmtune.train.step_metrics import StepResult

SCALE = 1024.0


class LowRank(nn.Module):
    """Scores by a matrix B diag(E) A; the gradient is multiplied by `factor`."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.e = nn.Parameter(torch.randn(3, 1, generator=generator))
        self.b = nn.Parameter(torch.randn(3, 3, generator=generator))
        self.factor = 1.0
        self.a.register_hook(lambda gradient: gradient * self.factor)

    def forward(self, batch: Batch) -> Tensor:
        logits = (self.b @ (self.e * self.a)).T[batch.inputs["input_ids"][0]]
        return nn.functional.cross_entropy(logits, batch.targets, reduction="sum")


class Warm(NextToken):
    """The loss, and a temperature of its own whose gradient is `gradient`."""

    def __init__(self, gradient: float) -> None:
        self.tensors: Mapping[str, nn.Parameter] = {"temperature": nn.Parameter(torch.ones(1))}
        self._gradient = gradient

    def backward(
        self, forward: nn.Module, data: StepBatch, accelerator: Accelerator, weight: float | Tensor
    ) -> Tensor:
        accelerator.backward(self.tensors["temperature"].sum() * self._gradient)
        return super().backward(forward, data, accelerator, weight)


def run(
    model: nn.Module,
    *,
    scaler: torch.amp.GradScaler | None,
    monkeypatch: pytest.MonkeyPatch,
    adapter: Adapter | None = None,
    objective: Objective | None = None,
    broken: tuple[int, ...] = (),
    max_grad_norm: float | None = None,
) -> list[StepResult]:
    """Eight steps, in `broken` ones with gradients that are not finite."""
    accelerator = build_accelerator("fp32")
    monkeypatch.setattr(accelerator, "scaler", scaler)
    objective = objective or NextToken()
    parameters = dict(model.named_parameters())
    tensors = [*parameters.values(), *objective.tensors.values()]
    groups = [{"params": tensors, "part": "language", "lr": 0.1, "peak_lr": 0.1}]
    optimizer = build_optimizer(groups, kind="adamw", device=accelerator.device)
    state = TrainState(
        model,
        adapter=adapter or NoAdapter(),
        parameters=parameters,
        part_of_name=dict.fromkeys(parameters, "language"),
        optimizer=AcceleratedOptimizer(optimizer, scaler=scaler),
        objective=objective,
    )
    results = []
    for step in range(1, 9):
        if isinstance(model, LowRank):
            model.factor = float("inf") if step in broken else 1.0
        pending = train_step(
            state,
            data_of(5, 2),
            step=step,
            accelerator=accelerator,
            max_grad_norm=max_grad_norm,
            defer_sync=True,
        )
        results.append(pending.read())
    return results


def adalora_of(model: LowRank) -> AdaLoraAdapter:
    schedule = BudgetSchedule(start=3, target=1, warmup=1, final=2, total=8, interval=2)
    triplets = {"m": Triplets(model.a, model.e, model.b)}
    allocator = RankAllocator(triplets, schedule, beta1=0.85, beta2=0.85)
    return AdaLoraAdapter(model, None, allocator, orthogonal_weight=0.1)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_the_importance_is_that_of_unscaled_gradients(monkeypatch, max_grad_norm):
    states = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=SCALE)):
        model = LowRank()
        adapter = adalora_of(model)
        run(
            model,
            scaler=scaler,
            adapter=adapter,
            monkeypatch=monkeypatch,
            max_grad_norm=max_grad_norm,
        )
        states.append(adapter.allocator.state_dict())
    plain, scaled = states
    for name, tensor in plain.items():
        assert torch.allclose(scaled[name].float(), tensor.float(), rtol=1e-5), name
    # The wrong variant: |w g| of a scaled gradient.
    assert not torch.allclose(plain["importance.m.e"] * SCALE, scaled["importance.m.e"], rtol=0.1)
    assert plain["importance.m.e"].max() > 0


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("broken", [(1,), (3,), (1, 2), (6,)])  # 6: the last choice of the masks
def test_a_step_that_is_thrown_away_leaves_importance_and_ranks_sound(
    monkeypatch, broken, max_grad_norm
):
    model = LowRank()
    adapter = adalora_of(model)
    seen = []
    take_in = adapter.allocator._update_importance
    monkeypatch.setattr(
        adapter.allocator, "_update_importance", lambda: seen.append(None) or take_in()
    )
    results = run(
        model,
        scaler=torch.amp.GradScaler("cpu", init_scale=SCALE),
        adapter=adapter,
        broken=broken,
        monkeypatch=monkeypatch,
        max_grad_norm=max_grad_norm,
    )
    assert [n for n, r in enumerate(results, 1) if r.was_skipped] == list(broken)
    assert len(seen) == 6 - len(broken)
    state = adapter.allocator.state_dict()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    assert adapter.allocator.ranks() == {"m": 1}
    assert torch.equal(model.e.squeeze(1) != 0, adapter.allocator.masks["m"])


@pytest.mark.parametrize(("gradient", "skipped"), [(1.0, False), (float("inf"), True)])
def test_a_tensor_of_the_objective_can_be_why_a_step_is_thrown_away(monkeypatch, gradient, skipped):
    model, objective = Scores(), Warm(gradient)
    results = run(
        model,
        scaler=torch.amp.GradScaler("cpu", init_scale=SCALE),
        objective=objective,
        monkeypatch=monkeypatch,
    )
    assert [r.was_skipped for r in results] == [skipped] * 8
    assert all(r.grad_norm < 10 for r in results), "that of the model, which is finite"
    assert torch.equal(model.weight, Scores().weight) == skipped
    assert (objective.tensors["temperature"].item() == 1.0) == skipped
