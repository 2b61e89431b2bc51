"""NF4 weights dequantised once: bit for bit the same training, 4-bit layers still, memory asked
for first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import psutil
import pytest
import torch
from torch import Tensor

from tests.models.adapted import METHODS, open_base, picture_inputs, randomise, recipe_for
from tests.tiny_models import save_tiny_model
from vlmtune.errors import VlmtuneError
from vlmtune.models import quantize
from vlmtune.models.adapters.registry import build_adapter
from vlmtune.models.quantize import (
    DequantizedLinear4bit,
    base_weight,
    bits_of,
    free_memory_bytes,
    keep_dequantized,
    quantization_report,
)
from vlmtune.recipe.schema import QuantizationSection


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("model"))


def linear_4bit(*, stored: torch.dtype, compute: torch.dtype, width: int, bias: bool) -> Any:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(width, 40, bias=bias, compute_dtype=compute, quant_type="nf4")
    weight = torch.randn(40, width).to(stored)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").requires_grad_(False)
    layer.support_avx512bf16_for_cpu = False
    return layer


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_layer_computes_the_same_bits_and_gradients(stored, compute, bias, autocast):
    layer = linear_4bit(stored=stored, compute=compute, width=96, bias=bias)
    kept = DequantizedLinear4bit(layer)
    found = []
    for module in (layer, kept):
        x = torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(1)).to(stored)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            evaluated = module(x)
            out = module(x.requires_grad_())
        (out.float() ** 2).sum().backward()
        found.append((evaluated, out.detach(), x.grad))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found, strict=True))
    assert torch.equal(base_weight(kept), base_weight(layer))


def test_the_gradient_needs_the_weight_as_it_was_stored():
    """Why two copies are kept where the dtypes differ: one would change the last bits."""
    layer = linear_4bit(stored=torch.float32, compute=torch.bfloat16, width=96, bias=False)
    kept = DequantizedLinear4bit(layer)
    assert not torch.equal(kept.forward_weight.float(), kept.backward_weight)


def trained(
    model_folder: Any, *, cached: bool, dtype: torch.dtype, compute: str, **changes: Any
) -> dict[str, Tensor]:
    """Loss and gradients of one pass over a picture, on a 4-bit base."""
    section = QuantizationSection(compute_dtype=compute, cache_dequantized=cached)
    vlm = open_base(model_folder, quantization_bit=4, quantization=section, dtype=dtype)
    recipe = recipe_for(
        model_folder,
        quantization_bit=4,
        quantization=section.model_dump(),
        lora_target=["all-linear"],
        **changes,
    )
    torch.manual_seed(0)
    model = build_adapter(vlm, recipe, total_steps=4).model
    kinds = {type(m) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert kinds == {DequantizedLinear4bit if cached else bnb.nn.Linear4bit}
    randomise(model, size=0.05)
    given = picture_inputs(vlm)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(**given, use_cache=False).logits.float().logsumexp(-1).mean()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "modules_to_save"])
@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.float32, "float32"),
        (torch.bfloat16, "bfloat16"),
        (torch.bfloat16, "float32"),
    ],
)
def test_loss_and_gradients_are_the_same_bits(model_folder, method, dtype, compute):
    plain, cached = (
        trained(model_folder, cached=c, dtype=dtype, compute=compute, **METHODS[method])
        for c in (False, True)
    )
    assert plain.keys() == cached.keys() and len(plain) > 20
    assert all(torch.equal(cached[n], t) for n, t in plain.items())


def test_layers_without_an_adapter_are_kept_too_and_all_stay_4_bit(model_folder, tmp_path):
    section = QuantizationSection(cache_dequantized=True)
    vlm = open_base(model_folder, quantization_bit=4, quantization=section)
    before = quantization_report(vlm.model, vlm.family)
    recipe = recipe_for(
        model_folder,
        quantization_bit=4,
        quantization={"cache_dequantized": True},
        lora_target=["q_proj"],
    )
    adapter = build_adapter(vlm, recipe, total_steps=1)
    layers = [m for m in adapter.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert {type(m) for m in layers} == {DequantizedLinear4bit}
    assert {bits_of(m) for m in layers} == {4}
    linear_4bit = {row.part: row.linear_4bit for row in before}
    assert sum(linear_4bit.values()) == len(layers)
    assert not any("forward_weight" in n for n in adapter.model.state_dict())
    adapter.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_it_is_said_how_much_memory_it_takes(model_folder, caplog):
    section = QuantizationSection(compute_dtype="float32")
    vlm = open_base(model_folder, quantization_bit=4, quantization=section)
    caplog.set_level("INFO", logger="vlmtune")
    assert keep_dequantized(vlm.model) == 2 * 7
    assert "14 4-bit layers keep their dequantised values: 0.00 GB" in caplog.text
    assert keep_dequantized(vlm.model) == 0  # there is none left


def test_too_little_memory_is_refused_with_the_figures(model_folder, monkeypatch):
    vlm = open_base(model_folder, quantization_bit=4)
    monkeypatch.setattr(quantize, "free_memory_bytes", lambda device: 1000)
    with pytest.raises(VlmtuneError, match=r"enough memory.*1e-06 GB free on cpu.*at least 0.000"):
        keep_dequantized(vlm.model)
    assert all(type(m) is not DequantizedLinear4bit for m in vlm.model.modules())
    monkeypatch.setattr(quantize, "free_memory_bytes", lambda device: 10**9)
    assert keep_dequantized(vlm.model) == 2 * 7


def test_free_memory_is_what_the_system_says(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=123 * 1024))
    assert free_memory_bytes(torch.device("cpu")) == 123 * 1024
