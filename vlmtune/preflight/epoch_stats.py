"""Steps, tokens and pictures of an epoch and of the run, and what they take of memory and disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.batches import Budget, num_steps, step_samples
from vlmtune.data.order import Order
from vlmtune.errors import VlmtuneError, plural
from vlmtune.preflight.memory import (
    Epoch,
    Memory,
    MicroBatch,
    epoch_of,
    memory_of,
    micro_batches,
    row_numbers,
    set_of,
)
from vlmtune.preflight.model import MetaModel, Trained
from vlmtune.preflight.sets import GOOD, NOT_ENCODED, TOO_LONG, CheckedSet
from vlmtune.recipe.schema import Recipe
from vlmtune.train.build import epochs_of

CACHE_BYTES_PER_TOKEN = 32
"""Ids, targets and token types of a cached sample, 8 bytes each."""


@dataclass(frozen=True)
class Disk:
    """Bytes: of one checkpoint, of the result, of the sample cache, of all that the run keeps at
    its fullest moment (without the cache), and what is free where the run is written."""

    checkpoint_bytes: int
    checkpoints: int
    result_bytes: int
    cache_bytes: int
    needed_bytes: int
    free_bytes: int


def disk_of(recipe: Recipe, trained: Trained, *, optimizer_bytes: int, cache_bytes: int) -> Disk:
    """What the run writes. A checkpoint is written beside the kept ones before the oldest goes."""
    tensors = 4 * trained.trainable_parameters
    result = tensors
    if trained.method == "full":
        result = 4 * sum(count.parameters for count in trained.parts.values())
    best = 0 if recipe.eval.best_metric is None else 1
    checkpoints = recipe.train.keep_checkpoints + 1 + best
    checkpoint = tensors + optimizer_bytes
    return Disk(
        checkpoint_bytes=checkpoint,
        checkpoints=checkpoints,
        result_bytes=result,
        cache_bytes=cache_bytes,
        needed_bytes=checkpoint * checkpoints + result,
        free_bytes=shutil.disk_usage(nearest_folder(Path(recipe.output_dir))).free,
    )


def check_room(disk: Disk, folder: Path) -> None:
    """Raise VlmtuneError where the run does not fit on the disk of `folder`."""
    if disk.needed_bytes > disk.free_bytes:
        raise VlmtuneError(
            "not enough disk space for the run",
            file=folder,
            got=f"{format_bytes(disk.free_bytes)} free",
            expected=f"{format_bytes(disk.needed_bytes)}: "
            f"{plural(disk.checkpoints, 'checkpoint')} of {format_bytes(disk.checkpoint_bytes)} "
            "and the result",
            do="free space, lower train.keep_checkpoints, or set another output_dir",
        )


def check_cache_folder(folder: Path) -> None:
    """Raise VlmtuneError where no sample can be kept in `folder`; training then goes on without."""
    absolute = folder.absolute()
    there = next(p for p in (absolute, *absolute.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise VlmtuneError(
            "the sample cache cannot be written; training goes on without it",
            file=folder,
            got=f"no permission to write in {there}" if there.is_dir() else f"a file at {there}",
            do="set data.cache_dir to a folder you may write to, or data.cache: off",
        )


def check_cache_room(cache_bytes: int, folder: Path) -> None:
    """Raise VlmtuneError where the sample cache does not fit on the disk of `folder`."""
    free = shutil.disk_usage(nearest_folder(folder)).free
    if cache_bytes > free:
        raise VlmtuneError(
            "not enough disk space for the sample cache",
            file=folder,
            got=f"{format_bytes(free)} free",
            expected=f"about {format_bytes(cache_bytes)}",
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


def format_bytes(number: float) -> str:
    """`820 kB`, `1.4 GB`: decimal units, as disks are sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.{0 if number >= 100 * size else 1}f} {unit}"
    return f"{number:.0f} B"


@dataclass(frozen=True)
class TrainingFigures:
    """`steps` and `epochs` of the run; `batches` are the micro-batches of its first steps.
    `cache_bytes`: what the sample cache would take, as far as samples encoded in full tell."""

    steps: int
    epochs: float
    epoch: Epoch
    batches: list[MicroBatch]
    cache_bytes: int

    @property
    def run(self) -> dict[str, int]:
        """The epoch's figures times the epochs."""
        counts = {
            name: getattr(self.epoch, name)
            for name in ("samples", "tokens", "supervised_tokens", "image_tokens", "images")
        }
        return {name: round(value * self.epochs) for name, value in counts.items()}

    def memory(
        self, recipe: Recipe, meta: MetaModel, trained: Trained, processor: Any
    ) -> Memory | None:
        """The estimate; None where no sample could be measured."""
        if not self.batches:
            return None
        return memory_of(
            recipe,
            meta,
            trained,
            self.batches,
            patches_per_media_token=patches_per_token(meta, processor),
        )


def training_figures(train: CheckedSet, recipe: Recipe, *, packs: bool) -> TrainingFigures:
    """What training on a checked set comes to; `packs`: without padding. Raises VlmtuneError where
    no sample is left."""
    numbers, order, scale = _order(train, recipe)
    table, batch_size = train.table, recipe.train.batch_size
    num_per_epoch = round(order.num_per_epoch * scale)
    epochs = epochs_of(recipe)
    if epochs is None:
        assert recipe.train.max_steps is not None
        steps = recipe.train.max_steps
        seen = steps * batch_size / num_per_epoch
    else:
        steps, seen = num_steps(epochs, num_per_epoch, batch_size), epochs
    batches = micro_batches(
        table,
        numbers,
        partial(step_samples, order=order, batch_size=batch_size),
        num_steps=min(steps, num_steps(1, order.num_per_epoch, batch_size)),
        budget=Budget(recipe.train.micro_batch_tokens, recipe.train.micro_batch_supervised_tokens),
        packs=packs,
    )
    epoch = epoch_of(
        table, numbers, order, batch_size=batch_size, num_per_epoch=num_per_epoch, scale=scale
    )
    per_media_token = table.media_bytes / table.media_of_bytes if table.media_of_bytes else 0.0
    whole = table.num_tokens()[table.rows(GOOD)].sum() / train.share
    media = np.frombuffer(table.media, np.uint32)[table.rows(GOOD)].sum() / train.share
    cache_bytes = round(float(whole) * CACHE_BYTES_PER_TOKEN + float(media) * per_media_token)
    return TrainingFigures(steps, seen, epoch, list(batches), cache_bytes)


def patches_per_token(meta: MetaModel, processor: Any) -> float:
    """Patches of the vision tower for one token of the language model: they are merged by squares
    of this side, in families that merge."""
    merge = getattr(processor.image_processor, "merge_size", None)
    scale = getattr(meta.model.config, "scale_factor", None)
    return float(int(merge or scale or 1) ** 2)


def _order(train: CheckedSet, recipe: Recipe) -> tuple[np.ndarray, Order, float]:
    """The samples of the stream as rows of the table, their order, and by what figures of the
    table are multiplied for those of the set."""
    table = train.table
    if not table.count(GOOD):
        raise VlmtuneError(
            "data.train: no sample is left to train on",
            got=f"{plural(len(table), 'row')}, none of which can be used",
        )
    if train.files and not train.is_partial:
        conversations = set_of(train.files, table)
        order = conversations.order(seed=recipe.seed)
        return row_numbers(train.files, conversations), order, 1.0
    # Of a stream or a choice of rows, any order is as good as another.
    numbers = table.rows(GOOD, NOT_ENCODED, TOO_LONG)
    return numbers, Order.uniform(recipe.seed, len(numbers)), 1 / train.share
