"""What must not change between a stop and its resume: recipe keys and data."""

from __future__ import annotations

from typing import Any

from vlmtune.data.source import access_of, cache_dir_of, content_hash
from vlmtune.data.stream import stream_identity
from vlmtune.recipe.data_section import DataSection, VideoSection
from vlmtune.recipe.schema import Recipe, TrainSection

# Changing these between a stop and its resume changes no step's result.
FREE_KEYS = {"output_dir", "eval", "data.eval", "data.num_workers"} | {
    f"train.{key}" for key in ("log_every", "eval_every", "save_every", "keep_checkpoints")
}
FREE_KEYS |= {f"data.{key}" for key in ("cache", "cache_dir", "url_timeout_seconds")}
FREE_KEYS |= {"quantization.cache_dequantized", "train.vision_cache", "train.vision_cache_bytes"}

LATER_KEYS: dict[str, object] = {
    f"{name}.{key}": section.model_fields[key].default
    for name, section, keys in (
        ("data", DataSection, ("streaming", "shuffle_buffer", "train_on", "allow_outside_paths")),
        ("data", DataSection, ("allow_urls", "allow_private_addresses", "max_download_bytes")),
        ("video", VideoSection, VideoSection.model_fields),
        ("train", TrainSection, ("packing", "micro_batch_supervised_tokens")),
    )
    for key in keys
}
"""Keys that came after the first checkpoints, and their defaults: with those, a checkpoint from
before there was such a key goes on."""


def fingerprint_of(recipe: Recipe, data_hashes: dict[str, str]) -> dict[str, Any]:
    """Every recipe key and data file that decides a step's result."""
    flat: dict[str, Any] = {}
    for key, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": x for inner, x in value.items()}
        else:
            flat[key] = value
    kept = {
        k: v for k, v in flat.items() if k not in FREE_KEYS and k.split(".")[0] not in FREE_KEYS
    }
    if recipe.objective == "contrastive":  # a key of `eval` that decides what is trained
        kept["eval.embedding_prompt"] = recipe.eval.embedding_prompt
    else:  # left out: a checkpoint from before there were objectives goes on
        new = ("objective", "contrastive")
        kept = {k: v for k, v in kept.items() if k.split(".")[0] not in new}
    for key, default in LATER_KEYS.items():
        if kept.get(key) == default:
            kept.pop(key, None)
    return kept | {f"content of {name}": digest for name, digest in data_hashes.items()}


def data_hashes_of(recipe: Recipe) -> dict[str, str]:
    """What the training files are told by: their content; of streamed ones size and time."""
    if recipe.data.streaming:
        return stream_identity(recipe.data.train)
    cache_dir = cache_dir_of(access_of(recipe.data))
    return {str(k): v for k, v in content_hash(recipe.data.train, cache_dir=cache_dir).items()}
