"""Figures of a step that are read late: none waits for the device, none is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.training import adapter_of, copy_sample, metrics_of, train_once, write_recipe
from vlmtune.data.types import Batch
from vlmtune.errors import VlmtuneError
from vlmtune.models import forward
from vlmtune.train import loop, step
from vlmtune.train.checkpoint import complete_checkpoints
from vlmtune.train.feed import StepBatch
from vlmtune.train.optim import build_optimizer
from vlmtune.train.runtime import build_accelerator, to_device_async
from vlmtune.train.state import TrainState
from vlmtune.train.step import NextToken, train_step
from vlmtune.train.step_metrics import AsyncStepMetrics, Counts


class Scores(nn.Module):
    """A model of one matrix: the sum of cross-entropies of a batch's targets."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
        self.factor = factor

    def forward(self, batch: Batch) -> Tensor:
        logits = self.weight[batch.inputs["input_ids"][0]] * self.factor
        return nn.functional.cross_entropy(logits, batch.targets, reduction="sum")


class NoAdapter:
    def penalty(self) -> Tensor | None:
        return None

    def after_step(self, step: int, *, skipped: Tensor | None = None) -> dict[str, object]:
        return {}


def data_of(*sizes: int) -> StepBatch:
    batches = [
        Batch(
            inputs={"input_ids": torch.arange(size)[None] % 4},
            supervised=torch.ones(1, size, dtype=torch.bool),
            targets=torch.arange(size) % 3,
            sample_ids=(f"sample-{number}",),
            num_tokens=size,
            num_images=0,
        )
        for number, size in enumerate(sizes)
    ]
    return StepBatch(
        batches, [], [], num_step_samples=len(sizes), positions=range(len(sizes)), epoch=0.0
    )


def a_step(
    model: Scores,
    *,
    defer_sync: bool,
    data: StepBatch | None = None,
    log_parts: bool = False,
    accelerator: Accelerator | None = None,
) -> AsyncStepMetrics:
    accelerator = accelerator or build_accelerator("fp32")
    groups = [{"params": [model.weight], "part": "language", "lr": 0.1, "peak_lr": 0.1}]
    optimizer = build_optimizer(groups, kind="adamw", device=accelerator.device)
    state = TrainState(
        model,
        adapter=NoAdapter(),
        parameters={"weight": model.weight},
        part_of_name={"weight": "language"},
        optimizer=AcceleratedOptimizer(optimizer, scaler=accelerator.scaler),
        objective=NextToken(),
    )
    return train_step(
        state,
        data or data_of(5, 2),
        step=3,
        accelerator=accelerator,
        max_grad_norm=0.1,
        log_parts=log_parts,
        defer_sync=defer_sync,
    )


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: a value taken out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_reads(monkeypatch) -> Iterator[Reads]:
    """`tolist` copies without a dispatch of its own."""
    with monkeypatch.context() as patched, Reads() as reads:
        tolist = Tensor.tolist

        def counting(tensor: Tensor):
            reads.count += 1
            return tolist(tensor)

        patched.setattr(Tensor, "tolist", counting)
        yield reads


@pytest.mark.parametrize("log_parts", [False, True])
def test_a_late_step_reads_nothing_from_the_device(monkeypatch, log_parts: bool):
    with counted_reads(monkeypatch) as reads:
        pending = a_step(Scores(), defer_sync=True, log_parts=log_parts)
        assert reads.count == 0
        pending.read()
        assert reads.count > 0
    with counted_reads(monkeypatch) as reads:
        a_step(Scores(), defer_sync=False)
    assert reads.count > 0  # the counter counts


def test_read_late_is_what_is_read_at_once():
    one, two = Scores(), Scores()
    defer_sync, now = (
        a_step(one, defer_sync=True, log_parts=True),
        a_step(two, defer_sync=False, log_parts=True),
    )
    with torch.no_grad():
        expected = now.read()
        for tensor in (one.weight, two.weight):
            assert not torch.equal(tensor, Scores().weight)
        one.weight.add_(1.0)  # the next step
    assert defer_sync.read() == expected
    assert expected.part_grad_norms == {"language": pytest.approx(expected.grad_norm)}
    assert (expected.num_terms, expected.weight, expected.stop) == (7, 7.0, False)


def test_counts_that_stay_on_the_device_give_the_same_step(monkeypatch):
    """As they do with several processes."""
    one, two = Scores(), Scores()
    expected = a_step(one, defer_sync=True)
    monkeypatch.setattr(
        step,
        "counts_of",
        lambda local, accelerator, defer_sync: Counts(to_device_async(local, accelerator.device)),
    )
    with counted_reads(monkeypatch) as reads:
        found = a_step(two, defer_sync=True)
        assert reads.count == 0
    assert found.read() == expected.read()
    assert torch.equal(one.weight, two.weight)
    nothing = [0.0, 0, 0, False, 0]
    assert (
        Counts(nothing).divisor == Counts(to_device_async(nothing, two.weight.device)).divisor == 1
    )


def test_a_step_that_is_not_finite_is_told_before_the_update_or_when_it_is_read():
    model = Scores(float("nan"))
    with pytest.raises(VlmtuneError, match="step 3: the loss is not finite.*sample-0, sample-1"):
        a_step(model, defer_sync=False)
    assert torch.equal(model.weight, Scores().weight)
    pending = a_step(model, defer_sync=True)
    assert not torch.equal(model.weight, Scores().weight)
    with pytest.raises(VlmtuneError, match="step 3: the loss is not finite.*sample-0, sample-1"):
        pending.read()


@pytest.mark.parametrize("positions", [(0,), (0, 0), (0, 1, 1)])
def test_samples_shared_out_otherwise_than_one_by_one_end_the_run(positions: tuple[int, ...]):
    """As processes would that cannot read the same files; here the only process does."""
    model = Scores()
    data = replace(data_of(5, 2), positions=positions)
    with pytest.raises(VlmtuneError, match="step 3: the processes do not agree"):
        a_step(model, defer_sync=False, data=data)
    assert torch.equal(model.weight, Scores().weight)
    pending = a_step(model, defer_sync=True, data=data)
    with pytest.raises(VlmtuneError, match="step 3: the processes do not agree"):
        pending.read()


def test_a_gradient_that_is_not_finite_is_told_late_too(monkeypatch):
    model = Scores()
    model.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(VlmtuneError, match="step 3: the gradient is not finite"):
        a_step(model, defer_sync=False)
    pending = a_step(model, defer_sync=True)
    with pytest.raises(VlmtuneError, match="step 3: the gradient is not finite"):
        pending.read()


def test_a_step_that_the_loss_scaler_throws_away_is_counted_and_changes_nothing(monkeypatch):
    """Also by the fused optimizer, which is told on the device."""
    found = []
    for factor in (1.0, float("inf")):
        accelerator = build_accelerator("fp32")
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        monkeypatch.setattr(accelerator, "scaler", scaler)
        model = Scores()
        model.weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        pending = a_step(model, defer_sync=True, accelerator=accelerator)
        found.append((pending.read().was_skipped, not torch.equal(model.weight, Scores().weight)))
    assert found == [(False, True), (True, False)]


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_vlm: Path, sample_data: Path):
    def make(name: str, **keys: object) -> Path:
        data = copy_sample(sample_data, tmp_path / "data", keep=16)
        settings = {"rank": 4, "train__max_steps": 8, "train__log_every": 5}
        return write_recipe(tmp_path / name, tiny_vlm=tiny_vlm, data=data, **(settings | keys))

    return make


def test_a_run_that_reads_late_is_the_same_run(make_recipe, tmp_path: Path, monkeypatch):
    """With a bad sample among the data, counted in the step that it belongs to."""
    now, defer_sync = make_recipe("now"), make_recipe("late")
    data = tmp_path / "data" / "train.jsonl"
    lines = data.read_text().splitlines()
    data.write_text("\n".join([lines[0].replace(".png", ".gone"), *lines[1:]]) + "\n")
    bad = ("data.on_bad_sample=skip", "data.max_bad_fraction=0.1")
    expected = train_once(now, *bad)
    monkeypatch.setattr(loop, "should_defer_sync", lambda device: True)
    found = train_once(defer_sync, *bad)
    assert expected["skipped"] == 1
    for key in ("steps", "samples", "skipped", "loss"):
        assert found[key] == expected[key]
    folders = now.parent / "run", defer_sync.parent / "run"
    one, two = (metrics_of(folder) for folder in folders)
    assert [m["step"] for m in one] == [5, 8]
    for a, b in zip(one, two, strict=True):
        for key in ("step", "loss", "grad_norm", "supervised_tokens", "epoch"):
            assert a[key] == b[key]
    one, two = (adapter_of(folder) for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)
    states = [complete_checkpoints(folder / "checkpoints") for folder in folders]
    for a, b in zip(*states, strict=True):
        left_out = [json.loads((path / "state.json").read_text())["left_out"] for path in (a, b)]
        assert left_out[0] == left_out[1]


@pytest.mark.parametrize(("broken", "saved"), [(5, [3]), (6, [3]), (7, [3, 6])])
def test_no_checkpoint_holds_a_step_that_is_not_finite(
    make_recipe, monkeypatch, broken: int, saved: list[int]
):
    """Step 5 is found one step late and step 6 before it is saved; all are called by their own
    number. Saved every third step, logged only at the end."""
    monkeypatch.setattr(loop, "should_defer_sync", lambda device: True)
    whole, calls = forward.summed_cross_entropy, []

    def summed(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        calls.append(1)
        # The first call is the look before the first step.
        factor = float("nan") if len(calls) == 1 + broken else 1.0
        return whole(logits, targets, weights) * factor

    monkeypatch.setattr(forward, "summed_cross_entropy", summed)
    recipe = make_recipe("run", train__log_every=100, train__micro_batch_tokens=4000)
    with pytest.raises(VlmtuneError, match=f"step {broken}: the loss is not finite.*train-"):
        train_once(recipe)
    found = complete_checkpoints(recipe.parent / "run" / "checkpoints")
    assert [int(path.name.removeprefix("step-")) for path in found] == saved
