"""Make the embedded default: a 7 MB Qwen2.5-VL that names, counts and checks simple shapes.

    python scripts/make_tiny_vlm.py --output data/sample/tiny-vlm

    tokenizer and architecture -> vision tower alone, by classification -> language part on it
    -> held-out accuracy per kind of question -> bfloat16 checkpoint with its processor

Pictures and text are drawn as training goes; nothing is downloaded. What was trained is kept in
the work folder every few minutes, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tiny_vlm.architecture import build_model, build_processor, save_checkpoint, train_tokenizer
from tiny_vlm.language import RowBuilder, held_out_accuracy, train_language
from tiny_vlm.tower import train_tower
from tiny_vlm.words import tokenizer_corpus

TOWER_STEPS = 2200
LANGUAGE_STEPS = 2000


def make_tiny_vlm(output: Path, *, work: Path, scale: float, seed: int) -> None:
    """Train for `scale` times the full number of steps, print the accuracies, write `output`."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(tokenizer_corpus())
    model = build_model(tokenizer)
    train_tower(model, steps=max(2, round(TOWER_STEPS * scale)), seed=seed, work=work)
    steps = max(2, round(LANGUAGE_STEPS * scale))
    train_language(model, tokenizer, steps=steps, seed=seed, work=work)
    model.to(torch.bfloat16).float()  # measured as it will be saved
    print("held-out exact answers, weights rounded to bfloat16")
    for kind, (right, count) in held_out_accuracy(
        model, RowBuilder(tokenizer), seed=seed, pictures=1024 if scale == 1 else 64
    ).items():
        print(f"  {kind:16} {right / count:.3f} of {count}")
    save_checkpoint(model, build_processor(tokenizer), output)
    print(f"wrote {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-vlm-work"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full training")
    parser.add_argument("--smoke", action="store_true", help="a few steps, in a fresh folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            make_tiny_vlm(arguments.output, work=Path(folder), scale=0.001, seed=arguments.seed)
    else:
        make_tiny_vlm(
            arguments.output, work=arguments.work, scale=arguments.scale, seed=arguments.seed
        )


if __name__ == "__main__":
    main()
