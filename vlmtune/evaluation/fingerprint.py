"""Whatever decides an answer, so that a kept one is used only where it would come out again.

The batch size and the number of processes are not among it: they change no answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vlmtune import __version__
from vlmtune.data.encode import Encoder
from vlmtune.data.fetch import is_url
from vlmtune.data.media import content_digest, locate_image
from vlmtune.data.types import Conversation, Image, Part, Text, Video
from vlmtune.evaluation.references import reference_answer
from vlmtune.models.load import VLM
from vlmtune.models.processor import pixel_budget
from vlmtune.recipe.schema import DecodingSection, EvalSection

VERSIONED = ("torch", "transformers", "peft")
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja")


def answer_settings(
    vlm: VLM,
    conversations: Iterable[Conversation],
    *,
    folders: Iterable[Path],
    quantization_bit: int,
    encoder: Encoder,
    section: EvalSection,
    seed: int,
) -> dict[str, Any]:
    """The settings of answers to `conversations`, as JSON has them. `folders` hold the model's
    files: adapter and base; a model of the hub is known by its commit."""
    decoding = decoding_in_effect(section.decoding)
    conversations = list(conversations)
    has_videos = any(conversation.videos for conversation in conversations)
    of_videos = {"video": encoder.video.model_dump(mode="json")} if has_videos else {}
    return of_videos | {
        "versions": {"vlmtune": __version__} | {name: metadata.version(name) for name in VERSIONED},
        "model": vlm.source,
        "commit": vlm.commit,
        "weights": {str(folder): model_files(folder) for folder in folders if folder.is_dir()},
        "dtype": str(vlm.model.dtype),
        "quantization_bit": quantization_bit,
        "pixel_budget": _plain(pixel_budget(vlm.processor)),
        "max_tokens": encoder.max_tokens,
        "over_length": encoder.over_length,
        "max_new_tokens": section.max_new_tokens,
        "decoding": decoding,
        "seed": seed if section.decoding.method == "sample" else None,
        "samples": samples_digest(conversations),
    }


def decoding_in_effect(decoding: DecodingSection) -> dict[str, Any]:
    """The keys of `decoding` that have an effect."""
    keys = {"greedy": (), "beam": ("num_beams",), "sample": ("temperature", "top_p", "top_k")}
    used = ("method", *keys[decoding.method], "stop")
    return {key: value for key, value in decoding.model_dump().items() if key in used}


def model_files(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of each file of a model or an adapter."""
    files = {path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(files)}


def samples_digest(conversations: Iterable[Conversation]) -> str:
    """SHA-256 over what is asked: the prompts' texts, and of each picture and video, or its frames,
    the file, its size and time."""
    digest = hashlib.sha256()
    for conversation in conversations:
        turns = conversation.turns
        asked = turns[:-1] if turns[-1].role == "assistant" else turns
        parts = [[turn.role, *(_identity(part) for part in turn.parts)] for turn in asked]
        digest.update(json.dumps([conversation.id, parts]).encode())
    return digest.hexdigest()


def references_digest(conversations: Iterable[Conversation]) -> str:
    """SHA-256 over what the answers are scored by: no answer depends on it, every figure does."""
    digest = hashlib.sha256()
    for conversation in conversations:
        scored_by = (
            reference_answer(conversation),
            conversation.answers,
            conversation.options,
            conversation.question_type,
        )
        digest.update(json.dumps([conversation.id, *scored_by]).encode())
    return digest.hexdigest()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """A short name for settings, for `metrics.json`."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _identity(part: Part) -> object:
    if isinstance(part, Text):
        return part.text
    if isinstance(part, Video):
        refs = part.ref if isinstance(part.ref, tuple) else (part.ref,)
        files = (Image(ref, part.base_dir, part.content, part.access) for ref in refs)
        return ["video", *map(_identity, files)]
    if is_url(part.ref):  # downloaded anew, it has a new time
        return content_digest(part)
    found = locate_image(part)
    if isinstance(found, bytes):
        return hashlib.sha256(found).hexdigest()
    status = found.stat()
    return [str(found.absolute()), status.st_size, status.st_mtime_ns]


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))
