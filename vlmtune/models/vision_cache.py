"""Where the features of pictures are kept: in memory, in files, or in both.

    FeatureCache -> stores, in order: MemoryStore | DiskStore

    folder/features/<tower>/ab/ab….safetensors       DiskStore, one file a picture

Both are bounded. A full store takes nothing more and throws nothing out: in a shuffled epoch the
picture that was used longest ago is the next one as likely as any other. A file is written beside
and renamed, so that any number of processes may share a folder and be killed at any moment; one
that cannot be read is made anew.
"""

from __future__ import annotations

import logging
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlmtune.data.whole_file import write_shared

logger = logging.getLogger("vlmtune")

CHECKSUM = "checksum"
"""In a file's metadata."""
GOING = ".going-"
"""How the name of a folder starts that is being removed; after a kill, that of one to remove."""


class FeatureStore(Protocol):
    """Keeps the tensors of a picture under a key, a hexadecimal digest."""

    def get(self, key: str) -> dict[str, Tensor] | None: ...

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Whether they are kept now."""

    @property
    def num_bytes(self) -> int:
        """What this store has taken in this process."""


@dataclass
class FeatureCache:
    """The stores in the order in which they are asked and filled, and how often they had what was
    asked for. `not_kept`: features that no store had room for."""

    stores: Sequence[FeatureStore]
    hits: int = 0
    misses: int = 0
    not_kept: int = 0

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The kept tensors, on the CPU."""
        for store in self.stores:
            found = store.get(key)
            if found is not None:
                self.hits += 1
                return found
        self.misses += 1
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        if not any(store.put(key, tensors) for store in self.stores):
            self.not_kept += 1

    def figures(self) -> dict[str, int]:
        """Counts, and the bytes that each kind of store has taken, in this process."""
        counts = {"hits": self.hits, "misses": self.misses, "not_kept": self.not_kept}
        names = {MemoryStore: "memory_bytes", DiskStore: "disk_bytes"}
        return counts | {names[type(store)]: store.num_bytes for store in self.stores}


@dataclass
class MemoryStore:
    """Tensors in this process, up to `max_bytes`."""

    max_bytes: int
    num_bytes: int = 0
    _kept: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def get(self, key: str) -> dict[str, Tensor] | None:
        return self._kept.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        size = size_of(tensors)
        if self.num_bytes + size > self.max_bytes:
            return False
        # A copy: a view would keep all of what it is a view of.
        self._kept[key] = {n: t.detach().to("cpu", copy=True) for n, t in tensors.items()}
        self.num_bytes += size
        return True


@dataclass
class DiskStore:
    """Files in `folder`, a subfolder of its parent for one tower. This process writes up to
    `max_bytes`; more where `others`, folders of other towers with their sizes, give way, first
    those used longest ago.

    Where a file cannot be written (a full disk) or not be opened (somebody else's), that is said
    once, and no other is.
    """

    folder: Path
    max_bytes: int
    others: list[tuple[Path, int]] = field(default_factory=list)
    num_bytes: int = 0
    _is_writable: bool = field(default=True, repr=False)
    _is_readable: bool = field(default=True, repr=False)

    def get(self, key: str) -> dict[str, Tensor] | None:
        if not self._is_readable:
            return None
        place = self._place(key)
        try:
            return _read(place)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._is_readable = False
            logger.warning(
                "the kept features cannot be read (%s: %s); they are made anew",
                self.folder,
                error.strerror or error,
            )
            return None
        except (SafetensorError, ValueError) as error:
            logger.warning("%s is made anew: it cannot be read (%s)", place, error)
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        if not self._is_writable or not self._make_room(size_of(tensors)):
            return False
        place = self._place(key)
        content = _to_bytes(tensors)
        try:
            write_shared(place, content)
        except OSError as error:
            self._is_writable = False
            logger.warning(
                "no more features are kept on disk (%s: %s); training goes on without",
                self.folder,
                error.strerror or error,
            )
            return False
        self.num_bytes += len(content)
        return True

    def _make_room(self, size: int) -> bool:
        while self.num_bytes + size > self.max_bytes and self.others:
            oldest, freed = self.others.pop(0)
            if _remove(oldest):
                self.max_bytes += freed
        return self.num_bytes + size <= self.max_bytes

    def _place(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def open_disk_store(
    cache_folder: Path, tower: str, *, max_bytes: int, num_processes: int
) -> DiskStore:
    """The store of the tower with the digest `tower` below `cache_folder`.

    `max_bytes` bounds the features of all towers together, and they take at most half of what is
    free on the disk; each of `num_processes` may write its share of what is left.
    """
    parent = cache_folder / "features"
    folder = parent / tower
    others: list[tuple[Path, int]] = []
    try:
        if folder.is_dir():
            os.utime(folder)  # when it was used last
        if parent.is_dir():
            found = [path for path in parent.iterdir() if path.is_dir() and path != folder]
            found.sort(key=lambda path: path.stat().st_mtime)
            others = [(path, folder_bytes(path)) for path in found]
        there = next(path for path in folder.parents if path.is_dir())
        free = shutil.disk_usage(there).free // 2
    except OSError as error:
        logger.warning(
            "features cannot be kept on disk (%s: %s); training goes on without",
            folder,
            error.strerror or error,
        )
        return DiskStore(folder, 0, _is_writable=False)
    taken = folder_bytes(folder) + sum(size for _, size in others)
    room = min(max_bytes - taken, free)  # below 0: more gives way before anything is written
    return DiskStore(folder, room // num_processes, others)


def folder_bytes(folder: Path) -> int:
    """The sizes of all files below a folder; files that go meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        total += 0 if path.is_dir() else status.st_size
    return total


def _remove(folder: Path) -> bool:
    """Whether this process did: of several only one may use the room. A folder cannot be moved
    twice, whereas two may see it while one of them removes it."""
    going = folder.with_name(f"{GOING}{folder.name}")
    try:
        folder.rename(going)
    except OSError:  # another was faster, or it is not ours to remove
        return False
    shutil.rmtree(going, ignore_errors=True)
    return True


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """In bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _read(place: Path) -> dict[str, Tensor]:
    """Raises OSError, SafetensorError or ValueError for what is no whole file of ours."""
    with safe_open(place, framework="pt", device="cpu") as stream:  # memory-mapped
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        checksum = (stream.metadata() or {}).get(CHECKSUM)
    if checksum != str(_checksum(tensors)):
        raise ValueError("its checksum is another")
    return tensors


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    plain = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
    return save(plain, {CHECKSUM: str(_checksum(plain))})


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Of names, shapes and bytes: a power cut may leave a file of the right length."""
    checksum = 0
    for name, value in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name}{value.dtype}{tuple(value.shape)}".encode(), checksum)
        checksum = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum
