"""The adapter's forward and backward pass: PEFT's layers and ours.

    python scripts/bench_adapters.py [--rounds 5] [--shapes 62M 3B] [--json FILE]

One decoder layer (seven adapted linear layers, no attention) of a model with random weights, bf16
with float32 factors of rank 16. Every variant takes its turn in every round, in one process; times
are medians, and ratios to PEFT's layers under autocast on the same base. Other work on the machine
moves all variants of a round.

    kept    what the backward pass keeps, in bytes, without parameters; a shared tensor once
    token   one token in evaluation, as in generation
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from vlmtune.models.adapters.lora_kernels import install_kernels


@dataclass(frozen=True)
class Shape:
    width: int
    key_width: int
    mlp_width: int
    tokens: int


@dataclass(frozen=True)
class Variant:
    name: str
    method: str
    bits: int = 16
    ours: bool = True
    autocast: bool = True


@dataclass(frozen=True)
class Row:
    shape: str
    method: str
    bits: int
    variant: str
    step_ms: float
    step_ratio: float
    token_ms: float
    token_ratio: float
    kept_bytes: int
    extra_weight_bytes: int


SHAPES = {
    "62M": Shape(width=512, key_width=128, mlp_width=1536, tokens=1024),
    "3B": Shape(width=2048, key_width=256, mlp_width=11008, tokens=512),
}

VARIANTS = [
    variant
    for method in ("lora", "dora")
    for bits in (16, 4)
    for variant in (
        Variant("PEFT, autocast", method, bits, ours=False),
        Variant("ours, autocast", method, bits),
        Variant("ours", method, bits, autocast=False),
    )
]


class Layer(nn.Module):
    """A decoder layer of the Qwen kind with everything but attention itself."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, k, m = shape.width, shape.key_width, shape.mlp_width
        self.norm, self.mlp_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q_proj = nn.Linear(d, d)
        self.k_proj, self.v_proj = nn.Linear(d, k), nn.Linear(d, k)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(d, m, bias=False), nn.Linear(d, m, bias=False)
        self.down_proj = nn.Linear(m, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        keys = torch.sigmoid(self.k_proj(y) + self.v_proj(y))
        groups = x.shape[-1] // keys.shape[-1]
        x = x + self.o_proj(self.q_proj(y) * keys.repeat(1, 1, groups))
        y = self.mlp_norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


def build(shape: Shape, variant: Variant) -> PeftModel:
    torch.manual_seed(0)
    base: Any = Layer(shape).bfloat16()
    base.is_loaded_in_4bit = variant.bits == 4
    if variant.bits == 4:
        for name, linear in list(base.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(base, name, nf4(linear))
    targets = [name for name, module in base.named_children() if isinstance(module, nn.Linear)]
    model = get_peft_model(
        base,
        LoraConfig(r=16, lora_alpha=32, target_modules=targets, use_dora=variant.method == "dora"),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.data += 0.01 * torch.randn(parameter.shape)
    if variant.ours:
        install_kernels(model)
    return model


def nf4(linear: nn.Linear) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    layer.load_state_dict(linear.state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    layer.support_avx512bf16_for_cpu = False  # as vlmtune sets it
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.bfloat16()
    return layer


def step_seconds(model: PeftModel, x: Tensor, *, autocast: bool) -> float:
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.train()(x)
    out.float().square().mean().backward()
    taken = time.perf_counter() - start
    model.zero_grad()
    return taken


@torch.no_grad()
def token_seconds(model: PeftModel, x: Tensor, *, autocast: bool) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.eval()(x)  # not counted: the first pass of an evaluation
        start = time.perf_counter()
        model(x)
        return time.perf_counter() - start


def kept_bytes(model: PeftModel, x: Tensor, *, autocast: bool) -> int:
    parameters = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    parameters |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = model.train()(x)
    del out
    return sum(storage.nbytes() for storage in kept.values())


def measure(name: str, variants: Sequence[Variant], *, rounds: int) -> list[Row]:
    """The variants of one method and base: the first is the one that ratios refer to."""
    shape = SHAPES[name]
    x = torch.randn(1, shape.tokens, shape.width).bfloat16().requires_grad_()
    token = torch.randn(1, 1, shape.width).bfloat16()
    models = [build(shape, variant) for variant in variants]
    steps: list[list[float]] = [[] for _ in variants]
    tokens: list[list[float]] = [[] for _ in variants]
    for number in range(rounds + 1):
        for i, (model, variant) in enumerate(zip(models, variants, strict=True)):
            step = step_seconds(model, x, autocast=variant.autocast)
            one = token_seconds(model, token, autocast=variant.autocast)
            if number > 0:  # the first round warms up
                steps[i].append(step)
                tokens[i].append(one)
    found = []
    for i, (model, variant) in enumerate(zip(models, variants, strict=True)):
        step, one = statistics.median(steps[i]), statistics.median(tokens[i])
        found.append(
            Row(
                shape=name,
                method=variant.method,
                bits=variant.bits,
                variant=variant.name,
                step_ms=step * 1e3,
                step_ratio=step / statistics.median(steps[0]),
                token_ms=one * 1e3,
                token_ratio=one / statistics.median(tokens[0]),
                kept_bytes=kept_bytes(model, x, autocast=variant.autocast),
                extra_weight_bytes=sum({b.data_ptr(): b.nbytes for b in model.buffers()}.values()),
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="PEFT's adapter layers and ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, bf16, rank 16")
    print("| layer of | method | bits | variant | step ms | ratio | token ms | ratio | kept MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    every: list[Row] = []
    for name in arguments.shapes:
        for method in ("lora", "dora"):
            for bits in (16, 4):
                chosen = [v for v in VARIANTS if (v.method, v.bits) == (method, bits)]
                for row in measure(name, chosen, rounds=arguments.rounds):
                    every.append(row)
                    print(
                        f"| {row.shape} | {row.method} | {row.bits} | {row.variant} | "
                        f"{row.step_ms:.1f} | {row.step_ratio:.2f} | {row.token_ms:.2f} | "
                        f"{row.token_ratio:.2f} | {row.kept_bytes / 1e6:.1f} |"
                    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in every], indent=1) + "\n")


if __name__ == "__main__":
    main()
