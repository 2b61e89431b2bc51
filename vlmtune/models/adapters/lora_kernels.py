"""LoRA's and DoRA's forward passes in the compute dtype, and which of PEFT's layers get them.

    h   = x A^T                        # (T, r)
    out = W x + s h B^T                # (T, O), added to the base layer's output in place

PEFT casts the input to the factors' float32, which under bf16 costs two casts and keeps a copy of
the input for each of q, k, v and each of gate, up. Here the factors are cast instead, and the
neighbours keep one and the same `x`. The factors, their gradients and what is saved stay float32.

PEFT asks an object in `layer.lora_variant` for the forward pass and for merging: ours goes there.
The layers, their names, the adapter's files and what stock PEFT loads do not
change.

Letters: T tokens, I input features, O output features, r rank, s the adapter's scale.

Liu et al. 2024, arXiv 2402.09353, eq. 5, with the norm a constant in the backward pass (section
4.3); c is the bias of the base layer:

    norm = |W + s B A|, of every row, float32          # (O,)
    out  = c + (m / norm) (W x + s B A x)              # (T, O)

PEFT forms B A by sending an identity (I, I) through the adapter in every forward pass. Here
`W + s B A` is formed a few rows at a time and never kept. (The closed form, |W|^2 + 2 s <W, BA> +
s^2 |BA|^2, takes as many operations, is slower on 16-bit weights, and cancels where a row is
nearly gone.)

m are the trained magnitudes.

Before training and after loading, `install_kernels` gives LoRA's and DoRA's layers the forward
passes of this file; layers of any other kind stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear, LoraVariant
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vlmtune.models.adapters.base import ADAPTER, tuner_layers
from vlmtune.models.precision import autocast_dtype, without_autocast
from vlmtune.models.quantize import base_weight


def compute_dtype(result: Tensor) -> torch.dtype:
    """The dtype of an adapter's products: autocast's where it is on, else the base output's."""
    dtype = autocast_dtype(result.device)
    return result.dtype if dtype is None or result.dtype == torch.float64 else dtype


class FusedLora(LoraVariant):
    """What PEFT asks of a variant, for plain LoRA. Merging is PEFT's own formula."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        x = module.lora_dropout[active_adapter](x)
        return LoraProduct.apply(
            x,
            result,
            module.lora_A[active_adapter].weight,
            module.lora_B[active_adapter].weight,
            module.scaling[active_adapter],
            compute_dtype(result),
        )

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class LoraProduct(torch.autograd.Function):
    """`result + s (x A^T) B^T`; x (..., I), result (..., O), A (r, I), B (O, r).

    `dtype` is that of the products. The result has `result`'s dtype, the gradients those of their
    tensors. `result` is used up: it is written to where autograd allows it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        result: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with without_autocast(x.device):
            h = rows(x).to(dtype) @ a.to(dtype).T  # (T, r)
            ctx.save_for_backward(x, h, a, b)
            ctx.scale = scale
            base, transposed = rows(result), b.to(dtype).T
            if result.dtype != dtype:
                return (base + (h @ transposed).mul_(scale).to(base.dtype)).view(result.shape)
            # In place on a view, autograd would copy the gradient.
            if result._is_view() or not result.is_contiguous():
                return torch.addmm(base, h, transposed, alpha=scale).view(result.shape)
            base.addmm_(h, transposed, alpha=scale)
            ctx.mark_dirty(result)
            return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, h, a, b = ctx.saved_tensors
        with without_autocast(x.device):
            g = rows(grad).to(h.dtype)  # (T, O)
            needs_x, _, needs_a, needs_b = ctx.needs_input_grad[:4]
            dx, da = input_grads(g, x, a, b * ctx.scale, needs_x=needs_x, needs_a=needs_a)
            db = (g.T @ h).to(b.dtype).mul_(ctx.scale) if needs_b else None
        return dx, grad, da, db, None, None


def rows(tensor: Tensor) -> Tensor:
    """(..., D) -> (T, D)."""
    return tensor.reshape(-1, tensor.shape[-1])


def input_grads(
    g: Tensor, x: Tensor, a: Tensor, scaled_b: Tensor, *, needs_x: bool, needs_a: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (..., I) and A (r, I) where they are needed, from `g` (T, O), that of the
    output, and `s B` (O, r)."""
    if not (needs_x or needs_a):
        return None, None
    dh = g @ scaled_b.to(g.dtype)  # (T, r)
    dx = (dh @ a.to(g.dtype)).view(x.shape).to(x.dtype) if needs_x else None
    da = (dh.T @ rows(x).to(g.dtype)).to(a.dtype) if needs_a else None
    return dx, da


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


def install_kernels(model: PeftModel) -> int:
    """Let the LoRA and DoRA layers of `model` compute as we do; how many there are.

    No number of the model changes, and neither does what it saves or merges. The computation is
    PEFT's in exact arithmetic; in 16 bit the adapter's products are rounded to the base's dtype.
    """
    count = 0
    for layer in tuner_layers(model).values():
        variant = _own_variant(layer)
        if variant is not None:
            layer.lora_variant[ADAPTER] = variant
            layer.cast_input_dtype_enabled = False
            count += 1
    return count


def needs_autocast(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `model` holds weights in another dtype than `dtype` that do not cast themselves.

    Our LoRA and DoRA compute in their input's dtype with float32 factors. Modules trained in full
    are float32 copies, and AdaLoRA's factors are float32: those need autocast, as does a base
    model that keeps some layers in another dtype. 4-bit and 8-bit weights do not count.
    """
    casting: set[int] = set()
    if isinstance(model, PeftModel):
        for layer in tuner_layers(model).values():
            # AdaLoRA's layers have no variant of ours.
            if isinstance(layer.lora_variant.get(ADAPTER), FusedLora | FusedDora):
                adapters = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
                casting |= {id(p) for module in adapters for p in module.parameters()}
    return any(
        p.is_floating_point() and p.dtype != dtype and id(p) not in casting
        for p in model.parameters()
    )


def _own_variant(layer: Any) -> LoraVariant | None:
    """Ours, for a linear layer with plain LoRA or DoRA as its only adapter; None for any other."""
    if type(layer) not in (Linear, Linear4bit, Linear8bitLt):
        return None
    if not isinstance(layer.get_base_layer(), nn.Linear) or list(layer.lora_A) != [ADAPTER]:
        return None
    if layer.lora_bias[ADAPTER]:
        return None
    variant = layer.lora_variant.get(ADAPTER)
    if variant is None:
        return FusedLora()
    return FusedDora() if type(variant) is DoraLinearVariant else None
