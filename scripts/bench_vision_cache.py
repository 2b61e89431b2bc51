"""What a kept picture saves, and what is left of its cost: decoding, processing, hashing, reading.

    python scripts/bench_vision_cache.py [--rounds 7] [--side 300] [--pictures 4] [--json FILE]

A Qwen2.5-VL of random weights, 62 M parameters, bf16, the language part's attention trains, one
JPEG a sample. Every variant takes its turn in every round, in one process; times are medians in
milliseconds a picture. Other work on the machine moves all variants of a round.

    decode    the file to a picture
    process   prompt, resizing, patches, label mask
    key       the digest of what goes into the tower
    own       forward and backward pass, the features made by the model in one call
    made      the features made one picture at a time and put into memory
    memory, disk    the features taken from there
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from vlmtune.data.batches import pack
from vlmtune.data.encode import Encoder
from vlmtune.data.media import read_image
from vlmtune.data.processing import media_keys_of
from vlmtune.data.types import Conversation, Image, Source, Text, Turn
from vlmtune.models.families import family_for
from vlmtune.models.forward import SupervisedForward
from vlmtune.models.load import load_processor
from vlmtune.models.packing import use_packed_attention
from vlmtune.models.vision import VisionFeatures
from vlmtune.models.vision_cache import (
    FeatureCache,
    FeatureStore,
    open_disk_store,
    open_memory_store,
)

PATCH = 14
SAMPLE_MODEL = Path(__file__).resolve().parent.parent / "data" / "sample" / "tiny-vlm"


def build_model(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 512, 1536, 10
    text.num_attention_heads, text.num_key_value_heads = 8, 2
    text.layer_types = ["full_attention"] * text.num_hidden_layers
    text.rope_parameters = text.rope_parameters | {"mrope_section": [8, 12, 12]}
    vision.hidden_size, vision.intermediate_size, vision.depth = 512, 1536, 8
    vision.num_heads, vision.out_hidden_size = 8, 512
    vision.patch_size, vision.window_size, vision.fullatt_block_indexes = PATCH, 8 * PATCH, [3, 7]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name and "_proj" in name and "mlp" not in name)
    use_packed_attention(model)
    return model


def build_encoder(folder: Path) -> Encoder:
    processor = load_processor(str(folder))
    processor.image_processor.patch_size = PATCH
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 2000 * 2000}
    return Encoder(processor, max_tokens=8192, over_length="error", max_image_pixels=10**8)


def conversations(folder: Path, *, side: int, count: int) -> list[Conversation]:
    made = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        noise = PIL.Image.effect_noise((side // 4, side // 4), 80 + number).convert("RGB")
        noise.resize((side, side), PIL.Image.Resampling.BICUBIC).save(path, quality=90)
        asked = Turn("user", (Image(path.name, folder), Text("how many are red?")))
        turns = (asked, Turn("assistant", (Text("two"),)))
        made.append(Conversation(str(number), turns, Source("bench", number + 1)))
    return made


def medians(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turn; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    model, family = build_model(SAMPLE_MODEL), family_for("qwen2_5_vl")
    encoder = build_encoder(SAMPLE_MODEL)
    given = conversations(folder, side=options.side, count=options.pictures)
    samples = [encoder.encode(conversation) for conversation in given]
    batch = pack(samples, image_batching="flat")
    batch.media_keys = media_keys_of(batch.inputs, "flat")
    trained = [p for p in model.parameters() if p.requires_grad]
    forward = SupervisedForward(model, family).train()

    def step(features: VisionFeatures | None) -> None:
        forward.features = features
        with torch.autocast("cpu", torch.bfloat16):
            torch.autograd.grad(forward(batch), trained)

    def kept(store: FeatureStore) -> VisionFeatures:
        return VisionFeatures(model, family, FeatureCache([store]))

    bound = 10**9
    disk = open_disk_store(folder, "bench", max_bytes=bound, num_processes=1)
    in_memory, on_disk = kept(open_memory_store(bound)), kept(disk)
    seconds = medians(
        {
            "decode": lambda: [read_image(c.images[0], max_pixels=10**8) for c in given],
            "decode + process": lambda: [encoder.encode(c) for c in given],
            "key": lambda: media_keys_of(batch.inputs, "flat"),
            "own": lambda: step(None),
            "made": lambda: step(kept(open_memory_store(bound))),
            "memory": lambda: step(in_memory),
            "disk": lambda: step(on_disk),
        },
        options.rounds,
    )
    figures = {name: value * 1e3 / len(given) for name, value in seconds.items()}
    tokens = sum(sample.num_tokens for sample in samples) / len(samples)
    pixels = sum(t.numel() * t.element_size() for t in samples[0].media.values())
    return figures | {"tokens a sample": tokens, "MB of pixels": pixels / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--side", type=int, default=300, help="of a picture, in pixels")
    parser.add_argument("--pictures", type=int, default=4, help="in the micro-batch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options)
    for name, value in figures.items():
        is_time = name not in ("tokens a sample", "MB of pixels")
        ratio = f"{value / figures['own']:8.2f}" if is_time else ""
        print(f"{name:20} {value:10.2f} {ratio}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
