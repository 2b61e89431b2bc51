"""Peak memory and time of a merge: tensor by tensor, and by PEFT with the whole model in memory.

    python scripts/bench_merge.py [--layers 24] [--rounds 2] [--work FOLDER]

A model of the Qwen2.5-VL architecture with random bfloat16 weights (24 layers: 730 MB) and a random
LoRA of rank 16 on every linear layer of its language part. Each merge runs in a process of its own,
in alternation; its peak resident memory is counted above what the libraries take. The first is
verified, the second (`merge_and_unload` in float32, `save_pretrained`) is not. Prints medians and
ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "sample" / "tiny-vlm"
WAYS = ("streamed", "whole")
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def make_target(folder: Path, layers: int) -> None:
    """Write the model to `folder/model`, in shards, and the adapter to `folder/adapter`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(TINY)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 1024, 4096, layers
    text.num_attention_heads, text.num_key_value_heads = 16, 4
    text.layer_types = ["full_attention"] * layers
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 8, 8]}
    config.vision_config.out_hidden_size = text.hidden_size
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="200MB")
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder / "model")
    paths = [
        name
        for name, _ in model.named_modules()
        if ".language_model." in name and name.rpartition(".")[2] in TARGETS
    ]
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=paths))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapted.save_pretrained(folder / "adapter")


def merge_once(way: str, folder: Path, shard_size: str) -> dict[str, float]:
    """Merge in this process: seconds, and the peak resident bytes above the libraries'."""
    import torch

    from vlmtune.models.merge import merge
    from vlmtune.models.open import open_target

    output = folder / f"merged-{way}"
    shutil.rmtree(output, ignore_errors=True)
    before = peak_bytes()
    start = time.perf_counter()
    if way == "streamed":
        merge(folder / "adapter", output, shard_size=shard_size)
    else:
        model: Any = open_target(folder / "adapter", dtype=torch.float32, device="cpu").vlm.model
        model.merge_and_unload().save_pretrained(output, max_shard_size=shard_size)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes() - before}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(*arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shard-size", default="200MB")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--once", choices=("make", *WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once == "make":
        make_target(options.work, options.layers)
        return
    if options.once:
        print(json.dumps(merge_once(options.once, options.work, options.shard_size)))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        shared = ("--work", name, "--layers", str(options.layers))
        in_process(*shared, "--once", "make")
        model = sum(p.stat().st_size for p in Path(name, "model").glob("*.safetensors"))
        print(f"model: {model / 1e6:.0f} MB, shards of {options.shard_size}")
        results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                lines = in_process(*shared, "--shard-size", options.shard_size, "--once", way)
                results[way].append(json.loads(lines.splitlines()[-1]))
    medians = {
        way: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for way, runs in results.items()
    }
    for way, median in medians.items():
        print(
            f"{way:9} {median['peak_bytes'] / 1e6:7.0f} MB above the libraries "
            f"({median['peak_bytes'] / model:.2f} x the model's files), {median['seconds']:.1f} s"
        )
    for key in ("peak_bytes", "seconds"):
        print(f"streamed / whole, {key}: {medians['streamed'][key] / medians['whole'][key]:.2f}")


if __name__ == "__main__":
    main()
