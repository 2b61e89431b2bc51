"""A digest of everything but the picture that decides what a frozen vision tower makes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from vlmtune.models.family import Family, part_of

VERSION = 1
"""Of what is kept of a picture, and how it is made."""

LIBRARIES = ("torch", "transformers", "bitsandbytes")
NOT_OF_THE_TOWER = ("text_config", "_name_or_path", "transformers_version", "architectures")
THREADS = 4


def tower_digest(base: Any, family: Family, parts: Collection[str]) -> str:
    """A digest of the tensors of `parts` (`vision`, `connector`), quantisation constants among
    them, of the config, the kind of device and the versions of the libraries.

    All of these tensors are read: about a second for a gigabyte.
    """
    config = {k: v for k, v in base.config.to_dict().items() if k not in NOT_OF_THE_TOWER}
    described = {
        "version": VERSION,
        "libraries": {name: version(name) for name in LIBRARIES},
        "model": type(base).__name__,
        "config": config,
        "attention": base.config.vision_config._attn_implementation,
        "device": base.device.type,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    named = dict(_tensors_of(base, family, parts))  # a path may be in two parts
    with ThreadPoolExecutor(THREADS) as threads:  # hashing lets go of the interpreter's lock
        for name, content in zip(named, threads.map(_content_digest, named.values()), strict=True):
            digest.update(f"{name} {content} ".encode())
    return digest.hexdigest()[:32]


def _tensors_of(base: Any, family: Family, parts: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    for part in parts:
        for path in family.parts[part]:
            for name, value in base.get_submodule(path).state_dict(prefix=f"{path}.").items():
                if isinstance(value, Tensor) and part_of(name, family) in parts:
                    yield name, value


def _content_digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
