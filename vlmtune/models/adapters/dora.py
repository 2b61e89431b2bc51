"""DoRA's forward pass without an identity matrix.

Liu et al. 2024, arXiv 2402.09353, eq. 5, with the norm a constant in the backward pass (section
4.3); c is the bias of the base layer:

    norm = |W + s B A|, of every row, float32          # (O,)
    out  = c + (m / norm) (W x + s B A x)              # (T, O)

PEFT forms B A by sending an identity (I, I) through the adapter in every forward pass. Here
`W + s B A` is formed a few rows at a time and never kept. (The closed form, |W|^2 + 2 s <W, BA> +
s^2 |BA|^2, takes as many operations, is slower on 16-bit weights, and cancels where a row is
nearly gone.)

Letters as in `fused.py`; m the trained magnitudes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vlmtune.models.adapters.fused import (
    compute_dtype,
    input_grads,
    rows,
)
from vlmtune.models.adapters.wrapping import ADAPTER, tuner_layers
from vlmtune.models.autocast import without_autocast
from vlmtune.models.dequantized import base_weight

BLOCK_ELEMENTS = {"cpu": 2**19}
"""Weights of a block, by device: on a CPU a block stays in its cache."""
DEFAULT_BLOCK_ELEMENTS = 2**25


@torch.no_grad()
def set_exact_magnitudes(model: PeftModel) -> None:
    """Start the magnitudes of an untrained DoRA at the float32 norms of the rows of W.

    PEFT takes the norm in the base's dtype: on a bf16 base the untrained adapter would change the
    model by 0.2 %.
    """
    for layer in tuner_layers(model).values():
        layer.lora_magnitude_vector[ADAPTER].weight.copy_(_norms_of(layer, ADAPTER))


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """The norms of the rows of `W + s B A`, (O,), in the dtype of A and B (float32)."""
    num_rows, width = weight.shape
    elements = BLOCK_ELEMENTS.get(weight.device.type, DEFAULT_BLOCK_ELEMENTS)
    step = max(1, elements // width)
    blocks = []
    with without_autocast(weight.device):
        for start in range(0, num_rows, step):
            block = weight[start : start + step].to(b.dtype)
            changed = torch.addmm(block, b[start : start + step], a, alpha=scale)
            blocks.append(torch.linalg.vector_norm(changed, dim=1))
    return torch.cat(blocks)


class FusedDora(DoraLinearVariant):
    """What PEFT asks of a variant; its initialisation and its merging stay PEFT's.

    In evaluation the norms are kept while nothing that they depend on changes: a generated token
    would cost them anew. Any forward pass in training drops them.
    """

    def __init__(self) -> None:
        self._kept: tuple[object, Tensor] | None = None

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        base_layer = module.get_base_layer()
        bias = None if base_layer.bias is None else base_layer.bias.detach()
        dropout = module.lora_dropout[active_adapter]
        factors = (
            module.lora_A[active_adapter].weight,
            module.lora_B[active_adapter].weight,
            module.lora_magnitude_vector[active_adapter].weight,
        )
        norm = self._norm(module, active_adapter)
        scale = module.scaling[active_adapter]
        dtype = compute_dtype(result)
        if isinstance(dropout, nn.Identity) or not module.training:
            return DoraProduct.apply(x, result, *factors, norm, bias, scale, dtype)
        x = dropout(x)
        base = base_layer(x) if bias is None else base_layer(x) - bias.to(result.dtype)
        return result + _change(x, base, *factors, norm=norm, scale=scale, dtype=dtype)

    def _norm(self, module: Any, adapter: str) -> Tensor:
        if module.training or torch.is_grad_enabled():
            self._kept = None
            return _norms_of(module, adapter)
        tensors = (
            module.get_base_layer().weight,
            module.lora_A[adapter].weight,
            module.lora_B[adapter].weight,
        )
        state = tuple((t.data_ptr(), t._version) for t in tensors)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, _norms_of(module, adapter))
        return self._kept[1]


def _norms_of(layer: Any, adapter: str) -> Tensor:
    return row_norms(
        base_weight(layer.get_base_layer()),
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
        scale=layer.scaling[adapter],
    )


def _change(
    x: Tensor,
    base: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    *,
    norm: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """What DoRA adds to the base output, where dropout gave the adapter an input of its own:
    `(m / norm - 1) W x + (m / norm) s B A x` of the dropped `x`, whose `base` is W x."""
    ratio = magnitude / norm
    with without_autocast(x.device):
        h = functional.linear(x.to(dtype), a.to(dtype))
        lora = functional.linear(h, b.to(dtype) * scale).to(base.dtype)
        return (ratio - 1).to(base.dtype) * base + ratio.to(base.dtype) * lora


class DoraProduct(torch.autograd.Function):
    """`c + (m / norm) (result - c + s (x A^T) B^T)`; x (..., I), result (..., O), c the bias (O,)
    that `result` holds, or None. `dtype` is that of the products.

    What is added to `result` is summed up first, and then added and rounded once: in bf16, a change
    of the magnitudes by 0.1 % would be lost on numbers that are rounded already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        bias: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with without_autocast(x.device):
            base = rows(result)  # (T, O)
            h = rows(x).to(dtype) @ a.to(dtype).T  # (T, r)
            ratio = magnitude / norm  # (O,)
            change = (h @ _scaled(b, ratio, scale).to(dtype).T).to(base.dtype)  # (T, O)
            change.addcmul_(base, (ratio - 1).to(base.dtype))
            if bias is not None:
                change -= ((ratio - 1) * bias).to(base.dtype)
            ctx.save_for_backward(x, h, base, a, b, magnitude, norm, bias)
            ctx.scale = scale
            return change.add_(base).view(result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, h, base, a, b, magnitude, norm, bias = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, needs_m = ctx.needs_input_grad[:5]
        with without_autocast(x.device):
            g = rows(grad)  # (T, O)
            product = g.to(h.dtype)
            ratio = magnitude / norm
            dx, da = input_grads(
                product, x, a, _scaled(b, ratio, ctx.scale), needs_x=needs_x, needs_a=needs_a
            )
            db = dm = None
            if needs_b or needs_m:
                correlation = (product.T @ h).to(b.dtype)  # (O, r)
                if needs_b:
                    db = _scaled(correlation, ratio, ctx.scale)
                if needs_m:
                    # bitsandbytes casts a bias to float32 in its first forward pass.
                    plain = base if bias is None else base - bias.to(base.dtype)
                    dm = (g * plain).sum(0, dtype=norm.dtype)
                    dm = (dm + ctx.scale * (correlation * b).sum(1)) / norm
            dbase = torch.addcmul(g, g, (ratio - 1).to(g.dtype)).view(grad.shape)
        return dx, dbase, da, db, dm, None, None, None, None


def _scaled(b: Tensor, ratio: Tensor, scale: float) -> Tensor:
    """`(m / norm) s B`, (O, r)."""
    return b * (ratio * scale).unsqueeze(1)
