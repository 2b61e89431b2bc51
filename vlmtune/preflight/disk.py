"""What a run writes, against what the disk has free, and who may write where."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from vlmtune.errors import VlmtuneError, plural
from vlmtune.preflight.model import Trained
from vlmtune.recipe.schema import Recipe

CACHE_BYTES_PER_TOKEN = 32
"""Ids, targets and token types of a cached sample, 8 bytes each."""


@dataclass(frozen=True)
class Disk:
    """Bytes: of one checkpoint, of all that a run keeps at its fullest moment, of the result, of
    the sample cache, and what is free where the run is written."""

    checkpoint_bytes: int
    checkpoints: int
    result_bytes: int
    cache_bytes: int
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.checkpoint_bytes * self.checkpoints + self.result_bytes


def disk_of(recipe: Recipe, trained: Trained, *, optimizer_bytes: int, cache_bytes: int) -> Disk:
    """What the run writes. A checkpoint is written beside the kept ones before the oldest goes."""
    tensors = 4 * trained.trainable_parameters
    result = tensors
    if trained.method == "full":
        result = 4 * sum(count.parameters for count in trained.parts.values())
    best = 0 if recipe.eval.best_metric is None else 1
    return Disk(
        checkpoint_bytes=tensors + optimizer_bytes,
        checkpoints=recipe.train.keep_checkpoints + 1 + best,
        result_bytes=result,
        cache_bytes=cache_bytes,
        free_bytes=shutil.disk_usage(nearest_folder(Path(recipe.output_dir))).free,
    )


def check_room(disk: Disk, folder: Path) -> None:
    """Raise VlmtuneError where the run does not fit on the disk of `folder`."""
    if disk.needed_bytes > disk.free_bytes:
        raise VlmtuneError(
            "there is too little room for the run",
            file=folder,
            got=f"{shown_bytes(disk.free_bytes)} free",
            expected=f"{shown_bytes(disk.needed_bytes)}: "
            f"{plural(disk.checkpoints, 'checkpoint')} of {shown_bytes(disk.checkpoint_bytes)} "
            "and the result",
            do="free space, lower train.keep_checkpoints, or set another output_dir",
        )


def check_cache_folder(folder: Path) -> None:
    """Raise VlmtuneError where no sample can be kept in `folder`; training then goes on without."""
    absolute = folder.absolute()
    there = next(p for p in (absolute, *absolute.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise VlmtuneError(
            "the sample cache cannot be written: no sample is kept",
            file=folder,
            got=f"no permission to write in {there}" if there.is_dir() else f"a file at {there}",
            do="set data.cache_dir to a folder you may write to, or data.cache: off",
        )


def check_cache_room(cache_bytes: int, folder: Path) -> None:
    """Raise VlmtuneError where the sample cache does not fit on the disk of `folder`."""
    free = shutil.disk_usage(nearest_folder(folder)).free
    if cache_bytes > free:
        raise VlmtuneError(
            "there is too little room for the sample cache",
            file=folder,
            got=f"{shown_bytes(free)} free",
            expected=f"about {shown_bytes(cache_bytes)}",
            do="free space, set another data.cache_dir, or data.cache: off",
        )


def check_writable(folder: Path) -> None:
    """Raise VlmtuneError where `folder` cannot be made or written."""
    there = nearest_folder(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        raise VlmtuneError(
            "the run folder cannot be written",
            file=folder,
            got=f"no permission to write in {there}",
            do="set output_dir to a folder you may write to",
        )


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    absolute = path.absolute()
    return next(p for p in (absolute, *absolute.parents) if p.is_dir())


def shown_bytes(number: float) -> str:
    """`820 kB`, `1.4 GB`: decimal units, as disks are sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.{0 if number >= 100 * size else 1}f} {unit}"
    return f"{number:.0f} B"
