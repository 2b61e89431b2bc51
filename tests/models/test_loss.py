"""The loss in chunks is the loss of the whole, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmtune.models import forward
from vlmtune.models.forward import chunk_rows_of, chunked_cross_entropy, summed_cross_entropy

ROWS, WIDTH, VOCABULARY = 37, 16, 50


@pytest.fixture
def given():
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    targets = torch.randint(VOCABULARY, (ROWS,))
    weights = torch.rand(ROWS) + 0.5
    return hidden, targets, weights


def gradients(loss: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss * 0.3, of))


@pytest.mark.parametrize("chunk_rows", [1, 10, 36, 37, 100])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(given, chunk_rows, is_weighted):
    hidden, targets, weights = given
    weights = weights if is_weighted else None
    head = nn.Linear(WIDTH, VOCABULARY)
    whole = summed_cross_entropy(head(hidden), targets, weights)
    chunked = chunked_cross_entropy(head, hidden, targets, weights, chunk_rows=chunk_rows)
    assert torch.allclose(whole, chunked, rtol=1e-6)
    expected = gradients(whole, hidden, head.weight, head.bias)
    found = gradients(chunked, hidden, head.weight, head.bias)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    with torch.no_grad():
        unrecorded = chunked_cross_entropy(head, hidden, targets, weights, chunk_rows=chunk_rows)
    assert torch.allclose(whole, unrecorded, rtol=1e-6)
    # The wrong variant: a mean in each chunk, or the last chunk left out.
    short = summed_cross_entropy(head(hidden[:-1]), targets[:-1])
    assert not torch.allclose(whole, short, rtol=1e-3)


def test_a_frozen_head_gets_no_gradient_and_frozen_rows_none(given):
    hidden, targets, _ = given
    head = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    loss = chunked_cross_entropy(head, hidden, targets, chunk_rows=5)
    loss.backward()
    assert head.weight.grad is None and hidden.grad is not None
    head.requires_grad_(True)
    loss = chunked_cross_entropy(head, hidden.detach(), targets, chunk_rows=5)
    loss.backward()
    assert head.weight.grad is not None


def test_no_more_than_a_chunk_of_logits_is_there_at_once(given, monkeypatch):
    hidden, targets, _ = given
    seen = []
    plain = forward.summed_cross_entropy

    def counted(logits, *others):
        seen.append(len(logits))
        return plain(logits, *others)

    monkeypatch.setattr(forward, "summed_cross_entropy", counted)
    head = nn.Linear(WIDTH, VOCABULARY)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        chunked_cross_entropy(head, hidden, targets, chunk_rows=10).backward()
    assert max(seen) == 10 and sum(seen) == ROWS
    # In the whole, the graph keeps (37, 50) until the backward pass.
    assert (ROWS, VOCABULARY) not in kept


def test_the_chunk_keeps_its_bytes_whatever_the_vocabulary():
    for device, numbers in (("cpu", 2**22), ("cuda", 2**24)):
        assert numbers // 2 < chunk_rows_of(151_936, device) * 151_936 <= numbers
        assert chunk_rows_of(8_192, device) == numbers // 8_192
        assert chunk_rows_of(10**9, device) == 16


def test_bf16_rows_get_bf16_gradients(given):
    hidden, targets, _ = given
    head = nn.Linear(WIDTH, VOCABULARY).bfloat16().requires_grad_(False)
    rows = hidden.detach().bfloat16().requires_grad_()
    chunked_cross_entropy(head, rows, targets, chunk_rows=10).backward()
    whole = rows.detach().clone().requires_grad_()
    summed_cross_entropy(head(whole), targets).backward()
    assert rows.grad is not None and rows.grad.dtype == torch.bfloat16
    assert torch.allclose(rows.grad, whole.grad, atol=1e-2)


@pytest.mark.parametrize("scale", [1 / 3, 1 / 1000, 65536 / 7, 65536.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_scale_of_a_16_bit_gradient_is_not_rounded(given, dtype, scale, is_weighted):
    hidden, targets, weights = given
    weights = weights if is_weighted else None
    head = nn.Linear(WIDTH, VOCABULARY).to(dtype)
    head.weight.data.mul_(0.1)  # the largest scale leaves the rows' gradients finite in fp16

    def scaled(by: float, chunk_rows: int) -> list[torch.Tensor]:
        rows = hidden.detach().to(dtype).requires_grad_()
        loss = chunked_cross_entropy(head, rows, targets, weights, chunk_rows=chunk_rows)
        return list(torch.autograd.grad(loss * by, (rows, head.weight, head.bias)))

    whole = scaled(scale, ROWS)[0].double()
    for chunk_rows in (1, 10, ROWS - 1):
        found, unscaled = scaled(scale, chunk_rows), scaled(1.0, chunk_rows)
        assert all(g.dtype == dtype for g in found)
        for gradient, one in zip(found, unscaled, strict=True):
            assert torch.equal(gradient, (one.float() * scale).to(dtype))
        # The wrong variant: the scale rounded to the gradient's dtype.
        rounded = torch.tensor(scale).to(dtype)
        if float(rounded) != float(torch.tensor(scale)):
            assert not torch.equal(found[0], unscaled[0] * rounded)
        if whole.isfinite().all():
            # On average the same as without chunks: roundings of single numbers cancel.
            ratio = (found[0].double() * whole).sum() / (whole * whole).sum()
            assert float(ratio) == pytest.approx(1.0, abs=1e-3)


def test_a_cpu_does_not_ask_for_the_fused_kernel(given):
    hidden, targets, weights = given
    head = nn.Linear(WIDTH, VOCABULARY)
    assert not forward._takes_liger(head, hidden, targets, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_fused_kernel_gives_the_same_loss_and_gradients(given):
    pytest.importorskip("liger_kernel")
    hidden, targets, weights = given
    head = nn.Linear(WIDTH, VOCABULARY).cuda()
    rows = hidden.detach().cuda().requires_grad_()
    assert forward._takes_liger(head, rows, targets.cuda(), None)
    assert not forward._takes_liger(head, rows, targets.cuda(), weights.cuda())
    fused = chunked_cross_entropy(head, rows, targets.cuda(), chunk_rows=10)
    whole = summed_cross_entropy(head(rows), targets.cuda())
    assert torch.allclose(fused, whole, rtol=1e-4)
    expected, found = (gradients(x, rows, head.weight) for x in (whole, fused))
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fused_kernel_does_not_round_the_scale_either(given, dtype):
    pytest.importorskip("liger_kernel")
    hidden, targets, _ = given
    head = nn.Linear(WIDTH, VOCABULARY).to("cuda", dtype)

    def scaled(by: float) -> list[torch.Tensor]:
        rows = hidden.detach().to("cuda", dtype).requires_grad_()
        loss = chunked_cross_entropy(head, rows, targets.cuda(), chunk_rows=10)
        return list(torch.autograd.grad(loss * by, (rows, head.weight)))

    for gradient, one in zip(scaled(65536 / 7), scaled(1.0), strict=True):
        assert torch.equal(gradient, (one.float() * (65536 / 7)).to(dtype))
