"""The weight files of a checkpoint, one tensor in memory at a time.

source -> weight_files -> stored_tensors: what is where, from the headers alone
                               read_tensor: one tensor; its pages go when it goes
write_tensors: model.safetensors, or shards and an index; a tensor is asked for when it is due
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from vlmtune.errors import VlmtuneError
from vlmtune.models.source import explained, quiet_transformers

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEADER_ALIGNMENT = 8
BYTES_PER_TRIM = 64 * 10**6

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a weight file: `key` is its name there."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a checkpoint to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def weight_files(source: str, *, revision: str | None = None) -> list[Path]:
    """The safetensors files of a folder or hub id, in order; downloads what is not in the cache.

    Raises VlmtuneError where there are none, or an index names a file that is not there.
    """
    try:
        return [_located(source, WEIGHTS_FILE, revision)]
    except OSError:
        pass  # sharded, or nothing that we read: the index tells
    try:
        index = json.loads(_located(source, INDEX_FILE, revision).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        return [_located(source, name, revision) for name in names]
    except (json.JSONDecodeError, KeyError) as error:
        raise VlmtuneError(
            f"{INDEX_FILE} is damaged: {error}", file=source, do="copy or download it again"
        ) from error
    except OSError as error:
        raise explained(
            error,
            source,
            what="the weights cannot be read",
            do=f"the model needs {WEIGHTS_FILE}, or the shards and {INDEX_FILE}",
        ) from error


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor of `files` by its key; reads headers only.

    Raises VlmtuneError for a damaged file, and a key that is in two files.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a mapping)
                    part = opened.get_slice(key)
                    if key in found:
                        raise VlmtuneError(
                            f"tensor {key} is in two weight files",
                            file=file,
                            got=f"it is in {found[key].file.name} too",
                        )
                    found[key] = StoredTensor(
                        file, key, tuple(part.get_shape()), DTYPES[part.get_dtype()]
                    )
        except SafetensorError as error:
            raise VlmtuneError(
                f"a weight file is damaged: {error}", file=file, do="copy or download it again"
            ) from error
    return found


def read_tensor(stored: StoredTensor) -> Tensor:
    """The tensor, in its own dtype. The file is mapped for as long as the tensor lives."""
    with safe_open(stored.file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(stored.key)
    return tensor


def write_tensors(
    folder: Path,
    planned: Sequence[PlannedTensor],
    tensor_of: Callable[[str], Tensor],
    *,
    shard_bytes: int,
) -> list[Path]:
    """Write a checkpoint's weights: files of at most `shard_bytes` (a larger tensor has its own).

    `tensor_of(key)` is called once for each tensor, in order, and its result is written at once.
    Raises OSError where the disk does not take it.
    """
    shards = list(_shards(planned, shard_bytes))
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
    heap = HeapKeeper()
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, tensor_of, heap)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(p.num_bytes for p in planned)},
            "weight_map": {
                p.key: name for name, shard in zip(names, shards, strict=True) for p in shard
            },
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def size_in_bytes(size: str) -> int:
    """`2GB` as a number of bytes; units are powers of 1000. Raises ValueError for another form."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB|TB)", size)
    if match is None:
        raise ValueError(f"not a size: {size!r}")
    return int(float(match[1]) * UNITS[match[2]])


def _located(source: str, name: str, revision: str | None) -> Path:
    with quiet_transformers():
        path = cached_file(source, name, revision=revision)
    assert path is not None, "cached_file raises where a file is missing"
    return Path(path)


def _shards(planned: Sequence[PlannedTensor], limit: int) -> Iterator[list[PlannedTensor]]:
    shard: list[PlannedTensor] = []
    size = 0
    for tensor in planned:
        if shard and size + tensor.num_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.num_bytes
    if shard:
        yield shard


def _write_file(
    path: Path,
    planned: Sequence[PlannedTensor],
    tensor_of: Callable[[str], Tensor],
    heap: HeapKeeper,
) -> None:
    """The safetensors format: the header's length, the header as JSON, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in planned:
        header[tensor.key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in planned:
            value = tensor_of(tensor.key).detach()
            assert (tuple(value.shape), value.dtype) == (tensor.shape, tensor.dtype), tensor.key
            stream.write(value.contiguous().reshape(-1).view(torch.uint8).numpy())
            del value
            heap.passed(tensor.num_bytes)


class HeapKeeper:
    """Gives memory that was freed back to the system, where the C library is glibc.

    It keeps the holes that tensors of many sizes, one after the other, leave in its heap: they grew
    to many times the live tensors. After every tensor, that would double the time of reading.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._num_bytes = 0

    def passed(self, num_bytes: int) -> None:
        """Count tensors of `num_bytes` that were made and dropped."""
        self._num_bytes += num_bytes
        if self._num_bytes >= BYTES_PER_TRIM:
            self._num_bytes = 0
            if self._library is not None and hasattr(self._library, "malloc_trim"):
                self._library.malloc_trim(0)
