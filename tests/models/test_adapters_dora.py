"""DoRA's own forward pass against PEFT's, its row norms, and the norms kept in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.adapted_layers import adapted_pair, difference, inputs, passed
from tests.models.test_adapters_fused import reference_of
from vlmtune.models.adapters import lora_kernels
from vlmtune.models.adapters.base import tuner_layers
from vlmtune.models.adapters.lora_kernels import DoraProduct, FusedDora, row_norms

EXACT = 2e-6


def factors(*, rows: int = 70, width: int = 48, rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    a = torch.randn(rank, width, generator=generator)
    return weight, a, torch.randn(rows, rank, generator=generator)


@pytest.mark.parametrize("block", [48 * 16, 1, 2**19])
def test_row_norms_are_those_of_the_changed_weight(monkeypatch, block):
    monkeypatch.setitem(lora_kernels.BLOCK_ELEMENTS, "cpu", block)
    weight, a, b = factors()
    w, scale = weight.double(), 1.7
    change = b.double() @ a.double()
    expected = torch.linalg.norm(w + scale * change, dim=1)
    torch.testing.assert_close(
        row_norms(weight, a, b, scale=scale).double(), expected, rtol=1e-6, atol=0
    )
    cross = 2 * scale * (w * change).sum(1)
    squares = [w.square().sum(1), cross, scale**2 * change.square().sum(1)]
    torch.testing.assert_close(sum(squares), expected.square())
    for wrong in (squares[0] + squares[2], squares[0] + cross + scale * change.square().sum(1)):
        assert (wrong.sqrt() - expected).abs().max() > 0.1


def test_a_row_that_is_nearly_gone_keeps_its_norm():
    _, a, b = factors()
    gone = (-b.double() @ a.double()).float()
    weight = gone + 1e-4 * torch.randn(gone.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.norm(weight.double() + b.double() @ a.double(), dim=1)
    norms = row_norms(weight, a, b, scale=1.0)
    torch.testing.assert_close(norms.double(), expected, rtol=2e-3, atol=0)
    closed = weight.square().sum(1) + 2 * ((weight @ a.T) * b).sum(1)
    closed += ((b @ (a @ a.T)) * b).sum(1)
    assert ((closed.clamp_min(0).sqrt() - expected) / expected).abs().max() > 0.5


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "rank_pattern": {"k": 3}}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outputs_and_gradients_are_those_of_peft(bits, config, dropout):
    stock, ours = adapted_pair(bits=bits, use_dora=True, lora_dropout=dropout, **config)
    for shape in ((2, 5), (7,)):
        expected = passed(stock, inputs(*shape))
        assert difference(passed(ours, inputs(*shape)), expected) < EXACT
    assert len(expected) == 2 + 3 * 4


def test_an_8_bit_base_gives_what_peft_gives_in_its_first_pass_and_gives_it_again():
    stock, ours = adapted_pair(bits=8, use_dora=True)
    expected = passed(stock, inputs())
    for _ in range(2):
        assert difference(passed(ours, inputs()), expected) < EXACT


@pytest.mark.parametrize("wrong", ["norm", "magnitude"])
def test_a_wrong_norm_or_magnitude_is_seen(monkeypatch, wrong):
    stock, ours = adapted_pair(use_dora=True)
    expected = passed(stock, inputs())
    if wrong == "norm":

        def base_norms(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
            return torch.linalg.norm(weight, dim=1)

        monkeypatch.setattr(lora_kernels, "row_norms", base_norms)
    else:
        for layer in tuner_layers(ours).values():
            layer.lora_magnitude_vector["default"].weight.data *= 1.001
    assert difference(passed(ours, inputs()), expected) > 1e-4


def test_gradients_are_those_of_finite_differences_with_the_norm_constant():
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    norm, bias = random(5).detach().abs() + 0.5, random(5).detach()
    for given in (bias, None):

        def apply(*tensors: Tensor, given: Tensor | None = given) -> Tensor:
            return DoraProduct.apply(*tensors, norm, given, 1.7, torch.float64)

        tensors = (random(3, 2, 4), random(3, 2, 5), random(2, 4), random(5, 2), random(5))
        assert torch.autograd.gradcheck(apply, tensors)


@pytest.mark.parametrize("bits", [16, 4])
def test_under_bf16_it_is_as_near_to_float32_as_peft_with_and_without_autocast(bits):
    stock, ours = adapted_pair(dtype=torch.bfloat16, bits=bits, use_dora=True)
    x = inputs(dtype=torch.bfloat16)
    expected = passed(reference_of(stock), x.detach().float().requires_grad_())
    error = difference(passed(stock, x, autocast=True), expected)
    for autocast in (True, False):
        found = passed(ours, x, autocast=autocast)
        assert difference(found, expected) < 1.5 * error
        assert found["out"].dtype == torch.bfloat16


def test_a_small_change_of_the_magnitudes_is_not_lost_in_bf16():
    """bf16 has steps of 0.4 to 0.8 %: a growth of 0.1 % survives only on average, where it is
    added to the adapter's output before that is rounded."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, generator=generator).bfloat16()
    base = torch.randn(4000, 16, generator=generator).bfloat16()
    a, b = torch.eye(2), 0.02 * torch.randn(16, 2, generator=generator)
    norm = torch.ones(16)
    lora = x.float() @ b.T

    def growth(out: Tensor) -> float:
        """The least-squares factor of the base in what was added to it."""
        return float(((out.float() - base.float() - lora) * base).sum() / base.square().sum())

    out = DoraProduct.apply(x, base, a, b, norm * 1.001, norm, None, 1.0, torch.bfloat16)
    assert growth(out) == pytest.approx(1e-3, rel=0.1)
    rounded_twice = (base + lora).bfloat16() * 1.001
    assert growth(rounded_twice.bfloat16()) < 5e-4


def count_norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return row_norms(*args, **kwargs)

    monkeypatch.setattr(lora_kernels, "row_norms", counted)
    return calls


def test_evaluation_takes_the_norms_once_and_again_after_a_change(monkeypatch):
    stock, ours = adapted_pair(use_dora=True)
    calls = count_norms(monkeypatch)
    x = inputs().detach()
    for model in (stock, ours):
        model.eval()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(ours(x), stock(x))
    assert len(calls) == 4
    name = "base_model.model.q.lora_B.default.weight"
    for model in (stock, ours):
        with torch.no_grad():
            model.get_parameter(name).add_(0.1)
            out = model(x)
    assert len(calls) == 5
    torch.testing.assert_close(out, stock(x))


def test_training_keeps_no_norm(monkeypatch):
    stock, ours = adapted_pair(use_dora=True)
    calls = count_norms(monkeypatch)
    x = inputs().detach()
    variant = tuner_layers(ours)["q"].lora_variant["default"]
    assert isinstance(variant, FusedDora)
    with torch.no_grad():
        ours.eval()(x)
        ours.train()(x)  # drops what evaluation kept
        for model in (stock, ours):
            parameter = model.get_parameter("base_model.model.q.lora_B.default.weight")
            parameter.data.add_(0.1)  # no trace in the version
        torch.testing.assert_close(ours.eval()(x), stock.eval()(x))
    assert len(calls) == 12
