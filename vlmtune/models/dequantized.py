"""NF4 weights dequantised once: the same numbers, sooner, for the memory of a 16-bit base.

bitsandbytes dequantises a 4-bit layer's weight in every forward and every backward pass, and again
in every recomputation. `keep_dequantized` puts a layer that holds the result beside the 4-bit
weight in its place. What is computed does not change, bit for bit where bitsandbytes itself
multiplies with the dequantised weight (on the CPU always, on a GPU for all but short inputs).

The layer is a `Linear4bit` still: reports, adapters and what is saved see the 4-bit weight.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, cast

import bitsandbytes as bnb
import psutil
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vlmtune.errors import VlmtuneError

logger = logging.getLogger("vlmtune")


class DequantizedLinear4bit(bnb.nn.Linear4bit):
    """A `Linear4bit` with its weight in `compute_dtype` beside it; takes over `layer`'s tensors."""

    def __init__(self, layer: bnb.nn.Linear4bit) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.compute_dtype,
            device="meta",
        )
        self.weight = layer.weight
        self.bias = layer.bias
        self.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu
        self.train(layer.training)
        stored = _quant_state(layer).dtype
        forward = _dequantized(layer, layer.compute_dtype)
        backward = forward if stored == layer.compute_dtype else _dequantized(layer, stored)
        self.register_buffer("forward_weight", forward, persistent=False)  # (O, I)
        self.register_buffer("backward_weight", backward, persistent=False)  # (O, I)

    def forward(self, x: Tensor) -> Tensor:
        weight = cast(Tensor, self.forward_weight)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        product = FrozenLinear.apply(x.to(weight.dtype), weight, bias, self.backward_weight)
        return product.to(x.dtype)


class FrozenLinear(torch.autograd.Function):
    """`x W^T + bias` with a frozen W, whose gradient of x is taken with `backward_weight`.

    bitsandbytes multiplies with W in `compute_dtype` on the way forward, and on the way back with
    W in the dtype that it had before it was quantised, cast: where the two differ, so do these.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, backward_weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(backward_weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        return torch.matmul(grad, weight.to(grad.dtype)), None, None, None


def keep_dequantized(model: nn.Module) -> int:
    """Replace every `Linear4bit` in `model`, in place; how many there were.

    Raises VlmtuneError where the memory has clearly no room for the weights.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is bnb.nn.Linear4bit
    ]
    needed = sum(_num_bytes(child) for _, _, child in found)
    _check_memory(needed, model)
    replaced: dict[nn.Module, DequantizedLinear4bit] = {}
    for parent, name, child in found:
        if child not in replaced:
            replaced[child] = DequantizedLinear4bit(child)
        setattr(parent, name, replaced[child])
    if found:
        logger.info(
            "%d 4-bit layers keep their dequantised values: %.2f GB more memory, the same loss",
            len(replaced),
            needed / 1e9,
        )
    return len(replaced)


def base_weight(layer: nn.Linear) -> Tensor:
    """The weight (O, I) of a linear layer, dequantised where it is quantised: that of PEFT's
    `dequantize_module_weight`, which on a CPU leaves an 8-bit layer unusable."""
    if isinstance(layer, DequantizedLinear4bit):
        return cast(Tensor, layer.backward_weight)
    if isinstance(layer, bnb.nn.Linear4bit):
        return dequantize_4bit(layer.weight.data, _quant_state(layer))
    if isinstance(layer, bnb.nn.Linear8bitLt):
        weight = cast(bnb.nn.Int8Params, layer.weight)
        # The scales move from the weight to the state in the first forward pass.
        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB
        assert scales is not None
        return int8_vectorwise_dequant(weight.data, scales)
    return layer.weight


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be had on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _check_memory(needed: int, model: nn.Module) -> None:
    device = next(model.parameters()).device
    free = free_memory_bytes(device)
    if needed > free:
        raise VlmtuneError(
            "quantization.cache_dequantized: the memory has no room for the dequantised weights",
            got=f"{free / 1e9:.3g} GB free on {device}",
            expected=f"at least {needed / 1e9:.3g} GB, and what the training itself takes",
            do="set quantization.cache_dequantized: false",
        )


def _num_bytes(layer: bnb.nn.Linear4bit) -> int:
    dtypes = {layer.compute_dtype, _quant_state(layer).dtype}
    return layer.in_features * layer.out_features * sum(dtype.itemsize for dtype in dtypes)


@torch.no_grad()
def _dequantized(layer: bnb.nn.Linear4bit, dtype: torch.dtype) -> Tensor:
    state = copy.copy(_quant_state(layer))
    state.dtype = dtype
    return dequantize_4bit(layer.weight.data, state)


def _quant_state(layer: bnb.nn.Linear4bit) -> QuantState:
    state = cast(bnb.nn.Params4bit, layer.weight).quant_state
    assert state is not None, "the layer is quantised when it is loaded"
    return state
