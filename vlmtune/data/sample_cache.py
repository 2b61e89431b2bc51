"""What the encoder made of a sample, kept on disk for later epochs and runs.

    folder/samples/ab/ab….safetensors

The key is a digest of everything that the sample depends on: its turns and weights, each medium
(a file's path, size and time of change; else its bytes), the processor, the encoder's settings and
the versions of the libraries. A file is written beside and renamed, so that any number of
processes may share a folder and be killed at any moment; a file that cannot be read is made anew.
Samples that cannot be used are not kept. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from vlmtune.data.media import locate_image, locate_video
from vlmtune.data.types import Conversation, Image, Media, Sample, Source, Text
from vlmtune.data.whole_file import write_shared
from vlmtune.errors import VlmtuneError

logger = logging.getLogger("vlmtune")

VERSION = 1
"""Of what a file holds, and of how the package makes a sample from its row."""

LIBRARIES = "vlmtune transformers tokenizers torch torchvision pillow av qwen-vl-utils".split()
_METADATA = "vlmtune"
_NOWHERE = Source("", 0)


@dataclass
class SampleCache:
    """Samples in `folder`, made by an encoder of `fingerprint`. Pickles into worker processes.

    Where a file cannot be written (a full disk) or not be opened (somebody else's), that is said
    once in each process, and no other is by it.
    """

    folder: Path
    fingerprint: str
    _is_writable: bool = field(default=True, repr=False)
    _is_readable: bool = field(default=True, repr=False)

    def sample(self, conversation: Conversation, make: Callable[[Conversation], Sample]) -> Sample:
        """The kept sample of `conversation`, or what `make` gives, which is kept then."""
        key = _key(conversation, self.fingerprint)
        if key is None:
            return make(conversation)
        kept = self._load(key) if self._is_readable else None
        if kept is not None:
            return replace(kept, id=conversation.id, source=conversation.source)
        sample = make(conversation)
        # A file that changed meanwhile may not be what was read.
        if self._is_writable and _key(conversation, self.fingerprint) == key:
            self._store(key, sample)
        return sample

    def _place(self, key: str) -> Path:
        return self.folder / "samples" / key[:2] / f"{key}.safetensors"

    def _load(self, key: str) -> Sample | None:
        try:
            content = self._place(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._is_readable = False
            logger.warning(
                "the sample cache cannot be read (%s: %s); samples are made anew",
                self.folder,
                error.strerror or error,
            )
            return None
        try:
            return _from_bytes(content)
        except (SafetensorError, ValueError, KeyError) as error:
            logger.warning("%s is made anew: it cannot be read (%s)", self._place(key), error)
            return None

    def _store(self, key: str, sample: Sample) -> None:
        place = self._place(key)
        try:
            write_shared(place, _to_bytes(sample))
        except OSError as error:
            self._is_writable = False
            logger.warning(
                "the sample cache takes no more samples (%s: %s); training goes on without",
                self.folder,
                error.strerror or error,
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
    return _digest(described)


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    state = dict(json.loads(tokenizer.backend_tokenizer.to_str()))
    # Of the last call, not of the tokenizer.
    return {name: value for name, value in state.items() if name not in ("padding", "truncation")}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _key(conversation: Conversation, fingerprint: str) -> str | None:
    """None where a medium is not there: whoever reads it says so."""
    turns = []
    try:
        for turn in conversation.turns:
            parts = [["text", p.text] if isinstance(p, Text) else _identity(p) for p in turn.parts]
            turns.append([turn.role, turn.weight, parts])
    except (VlmtuneError, OSError):
        return None
    return _digest([fingerprint, turns])


def _identity(media: Media) -> list[Any]:
    """Of a picture or a video: what changes where its content does."""
    if isinstance(media, Image):
        return ["image", _identity_of(locate_image(media))]
    if isinstance(media.ref, str):
        return ["video", _identity_of(locate_video(media))]
    frames = [Image(ref, media.base_dir, None, media.media_policy) for ref in media.ref]
    return ["frames", [_identity_of(locate_image(frame)) for frame in frames]]


def _identity_of(found: Path | bytes) -> list[Any]:
    return [hashlib.sha256(found).hexdigest()] if isinstance(found, bytes) else _of_file(found)


def _of_file(path: Path) -> list[Any]:
    status = path.stat()
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


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
        "checksum": _checksum(tensors),
    }
    return save(tensors, {_METADATA: json.dumps(rest)})


def _from_bytes(content: bytes) -> Sample:
    """Raises SafetensorError, ValueError or KeyError for what is no whole file of ours."""
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    rest = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_METADATA])
    if rest["checksum"] != _checksum(tensors):
        raise ValueError("its checksum is another")
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


def _checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """Of names, shapes and bytes: a power cut may leave a file of the right length."""
    checksum = 0
    for name, value in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name}{value.dtype}{tuple(value.shape)}".encode(), checksum)
        checksum = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum
