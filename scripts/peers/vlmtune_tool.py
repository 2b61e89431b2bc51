"""vlmtune's side of a case: the recipe, and what its first samples look like.

A key that a recipe does not know is an error of the run; nothing here falls back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.case import ALPHA, BATCH_SIZE, LEARNING_RATE, RANK, Case

FIXED = {
    "lora_target": ["language.attn", "language.mlp"],
    "rank": RANK,
    "alpha": ALPHA,
}


def recipe_of(case: Case) -> dict[str, Any]:
    length = {"max_steps": case.max_steps} if case.max_steps else {"epochs": case.epochs}
    output = Path(case.output)
    return FIXED | {
        "model": case.model,
        "output_dir": str(output / "run"),
        "seed": case.seed,
        "data": {
            "train": str(Path(case.data) / "rows.jsonl"),
            "max_tokens": 32768,
            "cache_dir": str(output / "cache"),
            "num_workers": case.num_workers,
        },
        "train": {
            **length,
            "batch_size": BATCH_SIZE,
            "micro_batch_tokens": case.tokens,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup": 0,
            "optimizer": "adamw",
            "gradient_checkpointing": case.checkpointing,
            "precision": "bf16",
            "log_every": 1,
            "save_every": 1.0,
        },
    }


def command_of(case: Case, python: str) -> list[str]:
    """Write the recipe (JSON is YAML) and return what trains by it."""
    path = Path(case.output) / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe_of(case), indent=1) + "\n")
    command = [python, "-m", "vlmtune", "train", str(path), *case.overrides]
    return [*command, "--resume", "never", "--quiet", "--json"]


def steps_file(case: Case) -> Path:
    return Path(case.output) / "run" / "metrics.jsonl"


@dataclass(frozen=True)
class Encoded:
    """A row as vlmtune trains on it; `labels` are at the token they name."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def num_supervised(self) -> int:
        return sum(label >= 0 for label in self.labels)


def encode_rows(model: str, folder: Path, *, limit: int) -> list[Encoded]:
    """The first `limit` rows of a workload's folder through vlmtune's own encoder."""
    from vlmtune.data.dataset import open_conversations
    from vlmtune.data.encode import Encoder
    from vlmtune.data.types import MediaPolicy
    from vlmtune.models.load import load_processor

    encoder = Encoder(
        load_processor(model),
        max_tokens=32768,
        over_length="error",
        max_image_pixels=100_000_000,
    )
    media_policy = MediaPolicy(cache_dir=folder / "cache")
    rows, _ = open_conversations(
        [folder / "rows.jsonl"], on_bad_sample="error", media_policy=media_policy
    )
    encoded = []
    for number in range(min(limit, len(rows))):
        sample = encoder.encode(rows[number])
        labels = (-100, *sample.targets.tolist()[:-1])
        encoded.append(Encoded(tuple(sample.input_ids.tolist()), labels))
    return encoded


def padded_tokens(lengths: Sequence[int], peer_batch: int) -> int:
    """Tokens, padding among them, of a peer's mean micro-batch: what vlmtune's may hold too."""
    groups = [lengths[i : i + peer_batch] for i in range(0, len(lengths), peer_batch)]
    return round(sum(len(group) * max(group) for group in groups) / len(groups))
