"""A few linear layers with PEFT's LoRA or DoRA on them, once as PEFT computes them and once as we
do, for comparing outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from vlmtune.models.adapters.lora_kernels import install_kernels

WIDTH = 64


class Layers(nn.Module):
    """Three layers that read one input (with and without a bias), and one that reads their sum."""

    is_loaded_in_4bit = is_loaded_in_8bit = False
    """PEFT asks these of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, 96)
        self.k = nn.Linear(WIDTH, 96, bias=False)
        self.v = nn.Linear(WIDTH, 96, bias=False)
        self.o = nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) * self.k(x) + self.v(x)))


def adapted_pair(
    *,
    dtype: torch.dtype = torch.float32,
    bits: int = 16,
    magnitude_size: float = 0.05,
    **config: Any,
) -> tuple[PeftModel, PeftModel]:
    """(PEFT's, ours): the same numbers, float32 adapters away from their start, on `dtype`."""
    torch.manual_seed(0)
    base: Any = Layers().to(dtype)
    if bits < 16:
        quantize(base, bits=bits, dtype=dtype)
    names = ["q", "k", "v", "o"]
    given = LoraConfig(**{"r": 8, "lora_alpha": 20, "target_modules": names, **config})
    stock = get_peft_model(base, given)
    for name, parameter in stock.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.data = parameter.data.float()
        size = magnitude_size if "magnitude" in name else 0.1
        parameter.data += torch.randn(parameter.shape) * size
    ours = copy.deepcopy(stock)
    assert install_kernels(ours) == len(names)
    return stock, ours


def quantize(model: Any, *, bits: int, dtype: torch.dtype) -> None:
    """Replace the linear layers of `model` by NF4 or LLM.int8() ones."""
    for name, layer in list(model.named_children()):
        new: Any
        shape = (layer.in_features, layer.out_features)
        if bits == 4:
            new = bnb.nn.Linear4bit(
                *shape, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
            )
        else:
            new = bnb.nn.Linear8bitLt(*shape, bias=layer.bias is not None, has_fp16_weights=False)
        new.load_state_dict(layer.state_dict())
        new = new.to("cpu")
        if bits == 4:
            new.support_avx512bf16_for_cpu = False
        if new.bias is not None:
            new.bias.data = new.bias.data.to(dtype)
        setattr(model, name, new.requires_grad_(False))
    setattr(model, f"is_loaded_in_{bits}bit", True)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*(shape or (2, 5)), WIDTH, generator=generator)
    return x.to(dtype).requires_grad_()


def passed(model: nn.Module, x: Tensor, *, autocast: bool = False) -> dict[str, Tensor]:
    """The output, and after a backward pass the gradients of the input and of what trains."""
    x = x.detach().requires_grad_(x.requires_grad)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    (out.float() * weights).sum().backward()
    found = {"out": out.detach()} | ({} if x.grad is None else {"x": x.grad})
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
            parameter.grad = None
    return found


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to that tensor's size."""
    assert found.keys() == expected.keys()
    return max(
        float((found[n].double() - t.double()).norm() / t.double().norm())
        for n, t in expected.items()
    )
