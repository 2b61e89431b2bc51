"""What the rest of a training step costs, around the model: ratios within one process.

    python scripts/bench_step.py [--parts optimizer autocast checkpoint] [--rounds 7] [--json FILE]

    optimizer   an update of the adapters of 70 linear layers: torch's fused, foreach and for-loop
                AdamW, bitsandbytes' with 8-bit state; and clipping
    autocast    forward and backward pass of ten decoder layers in bf16 with LoRA in all 70 linear
                ones: PEFT's layers under autocast, ours with and without it; the share of casts
    checkpoint  how long training is held up by a save, and what the steps beside it lose
    compile     (only where named) the ten layers under torch.compile: first pass and steady state

Every variant takes its turn in every round; times are medians. The decoder is that of a
Qwen2.5-VL of 62 M parameters with random weights. Other work on the machine moves all variants of
a round alike: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from vlmtune.models.adapters.lora_kernels import install_kernels
from vlmtune.train.checkpoint import Checkpoint, CheckpointMeta, CheckpointWriter, save_checkpoint
from vlmtune.train.optim import BETAS, EPS, build_optimizer
from vlmtune.train.step import clip_gradients

MODEL = Path(__file__).resolve().parent.parent / "data" / "sample" / "tiny-vlm"
TOKENS = 1024
CPU = torch.device("cpu")

Variants = Mapping[str, Callable[[], object]]


def in_turn(variants: Variants, *, rounds: int) -> dict[str, float]:
    """Median seconds of each; every one takes its turn in every round, the first not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if number > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def print_ratios(title: str, seconds: Mapping[str, float]) -> None:
    reference = next(iter(seconds.values()))
    print(f"\n| {title} | ms | ratio |\n|---|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {taken * 1e3:.2f} | {taken / reference:.2f} |")


def build_decoder(*, own: bool) -> PeftModel:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(MODEL).text_config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 1536, 10
    config.num_attention_heads, config.num_key_value_heads = 8, 2
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.rope_parameters["mrope_section"] = [16, 8, 8]  # half of a head's 64 numbers
    config.use_cache = False
    base: Any = Qwen2_5_VLTextModel._from_config(config, attn_implementation="sdpa").bfloat16()
    linears = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=linears))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.data += 0.01 * torch.randn(parameter.shape)
    if own:
        install_kernels(model)
    return model.train()


def forward_backward(model: nn.Module, rows: Tensor, *, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(inputs_embeds=rows).last_hidden_state
    out.float().square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None


def bench_optimizer(rounds: int) -> dict[str, float]:
    model = build_decoder(own=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"\n{len(trained)} tensors, {sum(p.numel() for p in trained) / 1e6:.2f} M numbers")

    def group(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": parameters, "part": "language", "lr": 1e-4, "peak_lr": 1e-4}]

    def copies() -> list[nn.Parameter]:
        found = [nn.Parameter(p.detach().clone()) for p in trained]
        for parameter in found:
            parameter.grad = torch.randn_like(parameter)
        return found

    def torchs(**kind: bool) -> Callable[[], object]:
        return torch.optim.AdamW(group(copies()), betas=BETAS, eps=EPS, **kind).step

    clipped = copies()
    seconds = in_turn(
        {
            "adamw (fused)": build_optimizer(group(copies()), kind="adamw", device=CPU).step,
            "foreach": torchs(foreach=True),
            "for-loop": torchs(foreach=False),
            "adamw_8bit": build_optimizer(group(copies()), kind="adamw_8bit", device=CPU).step,
            "clipping": lambda: clip_gradients(clipped, 1.0),
        },
        rounds=rounds,
    )
    print_ratios("update", seconds)
    rows = torch.randn(1, TOKENS, 512).bfloat16()
    step = in_turn({"step": lambda: forward_backward(model, rows, autocast=True)}, rounds=2)["step"]
    print(f"\nforward and backward of {TOKENS} tokens: {step * 1e3:.0f} ms; of it")
    for name, taken in seconds.items():
        print(f"  {name}: {taken / step:.2%}")
    return seconds | {"forward and backward": step}


def bench_autocast(rounds: int) -> dict[str, float]:
    rows = torch.randn(1, TOKENS, 512).bfloat16()
    stock, own = build_decoder(own=False), build_decoder(own=True)
    runs: dict[str, Callable[[], object]] = {
        "PEFT, autocast": lambda: forward_backward(stock, rows, autocast=True),
        "ours, autocast": lambda: forward_backward(own, rows, autocast=True),
        "ours, no autocast": lambda: forward_backward(own, rows, autocast=False),
    }
    seconds = in_turn(runs, rounds=rounds)
    print_ratios("ten layers, forward and backward", seconds)
    for name, run in runs.items():
        with torch.profiler.profile() as profile:
            run()
        spent = {e.key: e.self_cpu_time_total for e in profile.key_averages()}
        casts = spent.get("aten::copy_", 0) + spent.get("aten::_to_copy", 0)
        seconds[f"{name}: casts and copies, fraction"] = casts / sum(spent.values())
        print(f"casts and copies of {name}: {casts / sum(spent.values()):.1%}")
    return seconds


def state_of(megabytes: int) -> Checkpoint:
    """Weights and two moments in float32."""
    numbers = megabytes * 10**6 // 4 // 3
    tensors = {f"w{n}": torch.randn(numbers // 10) for n in range(10)}
    moments = {n: {"a": t.clone(), "b": t.clone()} for n, t in enumerate(tensors.values())}
    return Checkpoint(CheckpointMeta(1, 1, {}, []), tensors, {"optimizer": {"state": moments}}, [])


def bench_checkpoint(rounds: int) -> dict[str, float]:
    """A run saves once and computes for three seconds: the seconds until the first computation,
    and the computations made, against a run that saves nothing."""
    found: dict[str, float] = {}
    matrix = torch.randn(768, 768)

    def computations(until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            torch.mm(matrix, matrix)
            count += 1
        return count

    for megabytes in (12, 1200):
        checkpoint = state_of(megabytes)
        held: dict[str, list[float]] = {"while training waits": [], "beside": []}
        speed: dict[str, list[float]] = {"nothing": [], "beside": []}
        for _ in range(rounds):
            folder = Path(tempfile.mkdtemp(prefix="bench-step-"))
            start = time.perf_counter()
            save_checkpoint(folder, checkpoint, keep=1)
            held["while training waits"].append(time.perf_counter() - start)
            with CheckpointWriter(folder, keep=1) as writer:
                start = time.perf_counter()
                writer.save(checkpoint)
                held["beside"].append(time.perf_counter() - start)
                start, count = time.perf_counter(), 0
                while not writer.is_idle():
                    count += computations(time.perf_counter() + 0.02)
                taken = time.perf_counter() - start
                speed["beside"].append(count / max(taken, 1e-3))
                start = time.perf_counter()
                count = computations(start + max(taken, 0.2))
                speed["nothing"].append(count / (time.perf_counter() - start))
            shutil.rmtree(folder)
        medians = {name: statistics.median(times) for name, times in held.items()}
        print_ratios(f"{megabytes} MB: training is held up", medians)
        ratio = statistics.median(speed["beside"]) / statistics.median(speed["nothing"])
        print(f"speed of steps beside the write: {ratio:.2f}")
        found |= {f"{megabytes} MB, {name}": taken for name, taken in medians.items()}
        found[f"{megabytes} MB, speed beside the write"] = ratio
    return found


def bench_compile(rounds: int) -> dict[str, float]:
    """Of ten layers, ours without autocast, at three lengths in turn (dynamic shapes)."""
    plain, compiled = build_decoder(own=True), build_decoder(own=True)
    for layer in compiled.get_base_model().layers:
        layer.compile(dynamic=True)
    lengths = (1024, 768, 900)
    rows = [torch.randn(1, length, 512).bfloat16() for length in lengths]
    found = {}
    for number, row in enumerate(rows):
        start = time.perf_counter()
        forward_backward(compiled, row, autocast=False)
        found[f"first pass at length {lengths[number]}"] = time.perf_counter() - start
        print(
            f"first compiled pass at length {lengths[number]}: {time.perf_counter() - start:.1f} s"
        )

    def run(model: nn.Module) -> None:
        for row in rows:
            forward_backward(model, row, autocast=False)

    seconds = in_turn(
        {"eager": lambda: run(plain), "compiled": lambda: run(compiled)}, rounds=rounds
    )
    print_ratios("ten layers, three lengths", seconds)
    return found | seconds


PARTS: dict[str, Callable[[int], dict[str, float]]] = {
    "optimizer": bench_optimizer,
    "autocast": bench_autocast,
    "checkpoint": bench_checkpoint,
    "compile": bench_compile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="the rest of the step")
    default = [part for part in PARTS if part != "compile"]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    found = {part: PARTS[part](arguments.rounds) for part in arguments.parts}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
