"""LoRA's forward pass in the compute dtype, with nothing kept for the backward pass but `x`.

    h   = x A^T                        # (T, r)
    out = W x + s h B^T                # (T, O), added to the base layer's output in place

PEFT casts the input to the factors' float32, which under bf16 costs two casts and keeps a copy of
the input for each of q, k, v and each of gate, up. Here the factors are cast instead, and the
neighbours keep one and the same `x`. The factors, their gradients and what is saved stay float32.

PEFT asks an object in `layer.lora_variant` for the forward pass and for merging: ours goes there
(`own_forward.py`). The layers, their names, the adapter's files and what stock PEFT loads do not
change.

Letters: T tokens, I input features, O output features, r rank, s the adapter's scale.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmtune.models.autocast import autocast_dtype, without_autocast


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
