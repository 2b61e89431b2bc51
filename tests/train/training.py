"""Small real training runs for the tests: the embedded default on the sample task, in process."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from vlmtune.recipe.load import load_recipe
from vlmtune.sessions.train import train

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4, "use_dora": True},
    "adalora": {
        "adalora": {
            "initial_rank": 4,
            "target_rank": 2,
            "warmup": 2,
            "final": 3,
            "interval": 2,
        }
    },
}


def write_recipe(folder: Path, *, tiny_vlm: Path, data: Path, **keys: Any) -> Path:
    """A recipe of 12 short steps in `folder`; `keys` are added, `train__x` meaning `train.x`."""
    recipe: dict[str, Any] = {
        "model": str(tiny_vlm),
        "lora_target": ["q_proj", "v_proj", "vision_mlp"],
        "alpha": 8,
        "output_dir": str(folder / "run"),
        "data": {"train": str(data), "max_tokens": 256, "num_workers": 0},
        "train": {
            "max_steps": 12,
            "batch_size": 4,
            "micro_batch_tokens": 128,
            "learning_rate": 1e-3,
            "optimizer": "adamw",
            "gradient_checkpointing": False,
            "precision": "fp32",
            "log_every": 1,
            "save_every": 3,
        },
    }
    for key, value in keys.items():
        *sections, leaf = key.split("__")
        target = recipe
        for section in sections:
            target = target[section]
        target[leaf] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train_once(recipe: Path, *overrides: str, resume: str | None = None) -> dict[str, Any]:
    """What the command does after parsing its arguments, in this process; what it prints."""
    return asdict(train(load_recipe(recipe, overrides), resume=resume, quiet=True))


def adapter_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def copy_sample(sample_data: Path, folder: Path, *, keep: int) -> Path:
    """The first `keep` sample conversations with their pictures; the path of the data file."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(sample_data / "images", folder / "images", dirs_exist_ok=True)
    lines = (sample_data / "train.jsonl").read_text().splitlines()[:keep]
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
