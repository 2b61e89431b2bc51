"""The meta device has no autocast: what is only looked at there must not ask for one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmtune.models.adapters.adalora import AdaLoraAdapter, BudgetSchedule, RankAllocator, Triplets
from vlmtune.models.adapters.lora_kernels import DoraProduct, LoraProduct, compute_dtype, row_norms
from vlmtune.models.packing import pack_attention
from vlmtune.models.precision import autocast_dtype, without_autocast
from vlmtune.models.vision import _precision, _uncached_autocast

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("device", [CPU, META])
def test_without_it_products_keep_the_dtype_of_their_tensors(device: torch.device):
    product = torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    assert product.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.ones(2, 2) @ torch.ones(2, 2)
        with without_autocast(device):
            kept = torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)
    assert (rounded.dtype, kept.dtype) == (torch.bfloat16, torch.float32)


def test_its_dtype_is_told_where_it_is_on():
    with torch.autocast("cpu", torch.bfloat16):
        assert (autocast_dtype(CPU), autocast_dtype(META)) == (torch.bfloat16, None)
        assert (_precision(CPU), _precision(META)) == ("torch.bfloat16", "as the weights")
        with torch.autocast("cpu", enabled=False):
            assert autocast_dtype(CPU) is None
    assert autocast_dtype(CPU) is None


def test_every_product_of_ours_can_be_formed_on_the_meta_device():
    x, a, b = (
        torch.zeros(*shape, device=META, requires_grad=True) for shape in ((5, 4), (2, 4), (3, 2))
    )
    result = torch.zeros(5, 3, device=META)
    LoraProduct.apply(x, result.clone(), a, b, 0.5, compute_dtype(result)).sum().backward()
    norm = row_norms(torch.zeros(3, 4, device=META), a, b, scale=0.5)
    magnitude = nn.Parameter(norm.clone())
    DoraProduct.apply(x, result, a, b, magnitude, norm, None, 0.5, torch.float32).sum().backward()
    assert a.grad is not None and magnitude.grad is not None
    heads = torch.zeros(2, 5, 4, device=META, requires_grad=True)
    pack_attention(heads, heads, heads, lengths=[2, 3], scale=0.5).sum().backward()
    assert heads.grad is not None and heads.grad.shape == heads.shape
    with _uncached_autocast(META):
        assert torch.zeros(1, device=META).is_meta
    triplets = {"m": Triplets(a=a, e=torch.zeros(2, 1, device=META), b=b)}
    allocator = RankAllocator(triplets, BudgetSchedule(2, 1, 1, 1, 9, 3), beta1=0.8, beta2=0.8)
    method = AdaLoraAdapter(nn.Identity(), None, allocator, orthogonal_weight=0.1)
    penalty = method.penalty()
    assert penalty is not None and penalty.is_meta
