"""Stores the features of pictures in memory, in files, or in both.

    FeatureCache -> stores, in order: MemoryStore | DiskStore

    folder/features/<tower>/ab/ab…       DiskStore, one file a picture

Both are bounded. A full store takes nothing more and throws nothing out: in a shuffled epoch the
picture that was used longest ago is the next one as likely as any other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from vlmtune.files import DiskStore, MemoryStore

Tensors = dict[str, Tensor]
"""What is kept of one picture."""
FeatureStore = MemoryStore[Tensors] | DiskStore[Tensors]


@dataclass
class FeatureCache:
    """The stores in the order in which they are asked and filled, and how often they had what was
    asked for. `not_kept`: features that no store had room for."""

    stores: Sequence[FeatureStore]
    hits: int = 0
    misses: int = 0
    not_kept: int = 0

    def get(self, key: str) -> Tensors | None:
        """The kept tensors, on the CPU."""
        for store in self.stores:
            found = store.get(key)
            if found is not None:
                self.hits += 1
                return found
        self.misses += 1
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        num_bytes = size_of(tensors)
        for store in self.stores:
            if store.make_room(num_bytes) and store.put(key, _copied(tensors)):
                return
        self.not_kept += 1

    def figures(self) -> dict[str, int]:
        """Counts, and the bytes that each kind of store has taken, in this process."""
        counts = {"hits": self.hits, "misses": self.misses, "not_kept": self.not_kept}
        names = {MemoryStore: "memory_bytes", DiskStore: "disk_bytes"}
        return counts | {names[type(store)]: store.num_bytes for store in self.stores}


def open_memory_store(max_bytes: int, *, drops_oldest: bool = False) -> MemoryStore[Tensors]:
    """A store in this process. `drops_oldest`: what was used longest ago gives way."""
    return MemoryStore(max_bytes, size_of, drops_oldest)


def open_disk_store(
    cache_folder: Path, tower: str, *, max_bytes: int, num_processes: int
) -> DiskStore[Tensors]:
    """The store of the tower with the digest `tower` below `cache_folder`.

    `max_bytes` bounds the features of all towers together, and they take at most half of what is
    free on the disk; each of `num_processes` may write its share of what is left.
    """
    parent = cache_folder / "features"
    store = DiskStore(parent / tower, "features", save, load, max_bytes=0)
    folder = store.folder
    try:
        if folder.is_dir():
            os.utime(folder)  # when it was used last
        if parent.is_dir():
            found = [path for path in parent.iterdir() if path.is_dir() and path != folder]
            found.sort(key=lambda path: path.stat().st_mtime)
            store.others = [(path, folder_bytes(path)) for path in found]
        there = next(path for path in folder.parents if path.is_dir())
        free = shutil.disk_usage(there).free // 2
    except OSError as error:
        store.stop_writing(error)
        return store
    taken = folder_bytes(folder) + sum(size for _, size in store.others)
    room = min(max_bytes - taken, free)  # below 0: more gives way before anything is written
    store.max_bytes = room // num_processes
    return store


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


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """In bytes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _copied(tensors: Mapping[str, Tensor]) -> Tensors:
    """On the CPU. A view would keep all of what it is a view of."""
    return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
