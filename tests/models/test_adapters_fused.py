"""LoRA's own forward pass against PEFT's: outputs, gradients, memory, and merging."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models.adapted import METHODS, adapted, open_base, picture_inputs, recipe_for
from tests.models.adapted_layers import WIDTH, Layers, adapted_pair, difference, inputs, passed
from tests.tiny_models import save_tiny_model
from vlmtune.models.adapters.base import ADAPTER, tuner_layers
from vlmtune.models.adapters.lora_kernels import LoraProduct, install_kernels, needs_autocast
from vlmtune.models.adapters.registry import build_adapter

EXACT = 2e-6

CONFIGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "rank_pattern": {"k": 3}},
    {"lora_dropout": 0.3},
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model("qwen2_5_vl", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("bits", [16, 4, 8])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_outputs_and_gradients_are_those_of_peft(bits, config):
    stock, ours = adapted_pair(bits=bits, **config)
    for shape in ((2, 5), (7,)):
        expected = passed(stock, inputs(*shape))
        assert difference(passed(ours, inputs(*shape)), expected) < EXACT
    assert len(expected) == 2 + 2 * 4
    for layer in tuner_layers(ours).values():  # a wrong variant: the scale of another alpha
        layer.scaling[ADAPTER] *= 1.01
    assert difference(passed(ours, inputs(*shape)), expected) > 1e-3


def test_an_input_that_needs_no_gradient_gets_none():
    stock, ours = adapted_pair()
    x = inputs().detach()
    found = passed(ours, x)
    assert "x" not in found
    assert difference(found, passed(stock, x)) < EXACT


def test_a_frozen_factor_gets_no_gradient():
    stock, ours = adapted_pair()
    for model in (stock, ours):
        model.get_parameter("base_model.model.v.lora_A.default.weight").requires_grad_(False)
        model.get_parameter("base_model.model.o.lora_B.default.weight").requires_grad_(False)
    found = passed(ours, inputs())
    assert len(found) == 2 + 2 * 4 - 2
    assert difference(found, passed(stock, inputs())) < EXACT


@pytest.mark.parametrize("is_view", [False, True])
def test_gradients_are_those_of_finite_differences(is_view):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    def apply(x: Tensor, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        base = base.view(3, 2, 5) if is_view else base.view(3, 2, 5) * 1.5
        return LoraProduct.apply(x, base, a, b, 1.7, torch.float64)

    assert torch.autograd.gradcheck(
        apply, (random(3, 2, 4), random(6, 5), random(2, 4), random(5, 2))
    )


@pytest.mark.parametrize("bits", [16, 4])
def test_under_bf16_it_is_as_near_to_float32_as_peft_with_and_without_autocast(bits):
    stock, ours = adapted_pair(dtype=torch.bfloat16, bits=bits)
    reference = reference_of(stock)
    x = inputs(dtype=torch.bfloat16)
    expected = passed(reference, x.detach().float().requires_grad_())
    error = difference(passed(stock, x, autocast=True), expected)
    with_autocast = passed(ours, x, autocast=True)
    without = passed(ours, x)
    assert max(difference(with_autocast, expected), difference(without, expected)) < 1.5 * error
    assert without["out"].dtype == torch.bfloat16
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert {without[n].dtype for n in trained} == {torch.float32}
    with ours.disable_adapter():  # a wrong variant: no adapter at all
        out = ours(x).float()
    assert (out - expected["out"]).norm() > 10 * error * expected["out"].norm()


def reference_of(model: Any) -> Any:
    """`model` in float32, with its NF4 weights dequantised by hand."""
    from vlmtune.models.quantize import base_weight

    reference = copy.deepcopy(model).float()
    for path, layer in tuner_layers(model).items():
        base = layer.get_base_layer()
        plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        plain.weight.data = base_weight(base).detach().float()
        if base.bias is not None:
            plain.bias.data = base.bias.detach().float()
        tuner_layers(reference)[path].base_layer = plain.requires_grad_(False)
    return reference


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Memory kept for the backward pass by q, k and v, without parameters; a shared one once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    base: Any = model.get_base_model()  # type: ignore[operator]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = [base.q(x), base.k(x), base.v(x)]
    del outputs
    return sum(storage.nbytes() for storage in kept.values())


def test_neighbours_keep_one_input_and_no_copy_of_it():
    stock, ours = adapted_pair(dtype=torch.bfloat16)
    tokens, rank = 40, 8
    x = inputs(tokens, dtype=torch.bfloat16)
    assert saved_bytes(ours, x) == 2 * tokens * (WIDTH + 3 * rank)
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(ours, x) == 2 * tokens * (WIDTH + 3 * rank)
        assert saved_bytes(stock, x) >= 2 * tokens * (3 * WIDTH + 3 * rank)


@pytest.mark.parametrize("config", [{"lora_dropout": 0.3}, {}], ids=str)
def test_a_checkpointed_pass_draws_the_same_dropout_and_gives_the_same_gradients(config):
    _, ours = adapted_pair(**config)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ours

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    expected = passed(ours, inputs())
    found = {n.removeprefix("inner."): t for n, t in passed(Checkpointed(), inputs()).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_and_unmerging_are_those_of_peft(dtype, safe, use_dora):
    stock, ours = adapted_pair(dtype=dtype, use_dora=use_dora)
    weights = []
    for model in (stock, ours):
        layer = model.get_base_model().q
        before = layer.get_base_layer().weight.detach().clone()
        layer.merge(safe_merge=safe)
        merged = layer.get_base_layer().weight.detach().clone()
        assert not torch.equal(merged, before)
        layer.unmerge()
        weights.append((merged, layer.get_base_layer().weight.detach().clone()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_unloaded_model_computes_what_the_adapted_one_did(use_dora):
    _, ours = adapted_pair(use_dora=use_dora)
    with torch.no_grad():
        before = ours(inputs())
        with ours.disable_adapter():
            base = ours(inputs())
        merged = ours.merge_and_unload()(inputs())
    torch.testing.assert_close(merged, before)
    assert (base - before).abs().max() > 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_merging_into_a_quantised_base_is_that_of_peft(bits):
    stock, ours = adapted_pair(bits=bits)
    outputs = []
    for model in (stock, ours):
        with torch.no_grad(), pytest.warns(UserWarning, match="rounding errors"):
            outputs.append(model.merge_and_unload()(inputs()))
    torch.testing.assert_close(*outputs)


def test_layers_of_another_kind_stay_as_peft_computes_them():
    config: dict[str, Any] = {"r": 4, "target_modules": ["q", "k", "v", "o"]}
    for kind in (
        LoraConfig(**config, lora_bias=True),
        AdaLoraConfig(target_modules=config["target_modules"], total_step=9),
    ):
        model = get_peft_model(Layers(), kind)
        assert install_kernels(model) == 0
        assert not any(layer.lora_variant for layer in tuner_layers(model).values())
    embedding = get_peft_model(nn.Sequential(nn.Embedding(5, 6)), LoraConfig(target_modules=["0"]))
    assert install_kernels(embedding) == 0


@pytest.mark.parametrize("method", METHODS)
def test_autocast_is_needed_for_all_but_the_factors_of_lora_and_dora(model_folder, method):
    for dtype in (torch.bfloat16, torch.float32):
        vlm = open_base(model_folder, dtype=dtype)
        recipe = recipe_for(model_folder, **METHODS[method])
        model = build_adapter(vlm, recipe, total_steps=4).model
        only_factors = method in ("lora", "rslora", "dora")
        assert needs_autocast(model, dtype) == (dtype == torch.bfloat16 and not only_factors)
    assert needs_autocast(model, torch.bfloat16)  # a float32 base


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_bf16_model_trains_without_autocast(model_folder, method, bits):
    torch.manual_seed(0)
    vlm = open_base(model_folder, dtype=torch.bfloat16, quantization_bit=bits)
    recipe = recipe_for(model_folder, dropout=0.1, quantization_bit=bits, **METHODS[method])
    model = build_adapter(vlm, recipe, total_steps=1).model.train()
    assert not needs_autocast(model, torch.bfloat16)
    losses = []
    for autocast in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(**picture_inputs(vlm), use_cache=False).logits
        losses.append(logits.float().logsumexp(-1).mean())
    losses[1].backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-3, atol=0)


def test_a_step_of_the_optimizer_is_that_of_peft(model_folder):
    """Through the whole model: the same loss after an update, LoRA and DoRA."""
    for method in ("lora", "dora"):
        ours = adapted(model_folder, size=0.05, **METHODS[method])
        stock = copy.deepcopy(ours)
        for layer in tuner_layers(stock.model).values():  # type: ignore[arg-type]
            layer.cast_input_dtype_enabled = True
            layer.lora_variant.clear()
            if method == "dora":
                from peft.tuners.lora.variants import DoraLinearVariant

                layer.lora_variant[ADAPTER] = DoraLinearVariant()
        given = picture_inputs(open_base(model_folder))
        losses = []
        for adapter in (ours, stock):
            trained = [p for p in adapter.model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=0.05)
            for _ in range(2):
                loss = adapter.model(**given, use_cache=False).logits.logsumexp(-1).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
