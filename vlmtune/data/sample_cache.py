"""Keeps encoded samples on disk for later epochs and runs.

    folder/samples/ab/ab…

The key is a digest of everything that the sample depends on: its turns and weights, each medium
(a file's path, size and time of change; else its bytes), the processor, the encoder's settings and
the versions of the libraries. Samples that cannot be used are not kept. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from vlmtune.data.media import media_identity
from vlmtune.data.types import Conversation, Sample, Source, Text
from vlmtune.errors import VlmtuneError
from vlmtune.files import DiskStore, json_digest

VERSION = 1
"""Of what a file holds, and of how the package makes a sample from its row."""

LIBRARIES = "vlmtune transformers tokenizers torch torchvision pillow av qwen-vl-utils".split()
_METADATA = "vlmtune"
_NOWHERE = Source("", 0)


@dataclass
class SampleCache:
    """Samples in `store`, made by an encoder of `fingerprint`. Pickles into worker processes."""

    store: DiskStore[Sample]
    fingerprint: str

    def sample(self, conversation: Conversation, make: Callable[[Conversation], Sample]) -> Sample:
        """The kept sample of `conversation`, or what `make` gives, which is kept then."""
        key = _key(conversation, self.fingerprint)
        if key is None:
            return make(conversation)
        kept = self.store.get(key)
        if kept is not None:
            return replace(kept, id=conversation.id, source=conversation.source)
        sample = make(conversation)
        # A file that changed meanwhile may not be what was read.
        if self.store.is_writable and _key(conversation, self.fingerprint) == key:
            self.store.put(key, sample)
        return sample


def open_sample_cache(folder: Path, fingerprint: str) -> SampleCache:
    """The samples kept below `folder`."""
    return SampleCache(
        DiskStore(folder / "samples", "samples", _to_bytes, _from_bytes), fingerprint
    )


def fingerprint_of(processor: Any, settings: Mapping[str, Any]) -> str:
    """A digest of everything but the row that decides what a sample becomes: the processor with
    its tokenizer and chat template, the encoder's `settings`, and the libraries' versions."""
    parts = [getattr(processor, name, None) for name in ("image_processor", "video_processor")]
    tokenizer = processor.tokenizer
    described = {
        "version": VERSION,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "processor": [type(processor).__name__, processor.to_json_string()],
        "parts": [None if p is None else [type(p).__name__, p.to_json_string()] for p in parts],
        "tokenizer": [type(tokenizer).__name__, _tokenizer_state(tokenizer)],
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "chat_template": processor.chat_template,
        "settings": dict(settings),
    }
    return json_digest(described)


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    state = dict(json.loads(tokenizer.backend_tokenizer.to_str()))
    # Of the last call, not of the tokenizer.
    return {name: value for name, value in state.items() if name not in ("padding", "truncation")}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _key(conversation: Conversation, fingerprint: str) -> str | None:
    """None where a medium is not there: whoever reads it says so."""
    turns = []
    try:
        for turn in conversation.turns:
            parts = [p.text if isinstance(p, Text) else media_identity(p) for p in turn.parts]
            turns.append([turn.role, turn.weight, parts])
    except (VlmtuneError, OSError):
        return None
    return json_digest([fingerprint, turns])


def _to_bytes(sample: Sample) -> bytes:
    tensors = {"input_ids": sample.input_ids, "targets": sample.targets}
    if sample.weights is not None:
        tensors["weights"] = sample.weights
    tensors |= {f"token_fields.{name}": value for name, value in sample.token_fields.items()}
    tensors |= {f"media.{name}": value for name, value in sample.media.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    rest = {
        "num_images": sample.num_images,
        "num_videos": sample.num_videos,
        "notes": sample.notes,
    }
    return save(tensors, {_METADATA: json.dumps(rest)})


def _from_bytes(content: bytes) -> Sample:
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    rest = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_METADATA])
    groups: dict[str, dict[str, torch.Tensor]] = {"token_fields": {}, "media": {}}
    for name, value in tensors.items():
        group, _, field_name = name.partition(".")
        if field_name:
            groups[group][field_name] = value
    return Sample(
        id="",
        source=_NOWHERE,
        input_ids=tensors["input_ids"],
        targets=tensors["targets"],
        weights=tensors.get("weights"),
        num_images=rest["num_images"],
        num_videos=rest["num_videos"],
        notes=tuple(rest["notes"]),
        token_fields=groups["token_fields"],
        media=groups["media"],
    )
