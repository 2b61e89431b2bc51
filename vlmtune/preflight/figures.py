"""Steps, tokens and pictures of an epoch and of the run, and what they take of memory and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vlmtune.data.order import Order
from vlmtune.data.packing import Budget, num_steps, step_samples
from vlmtune.errors import VlmtuneError, plural
from vlmtune.preflight.disk import CACHE_BYTES_PER_TOKEN
from vlmtune.preflight.epoch import Epoch, MicroBatch, epoch_of, micro_batches, row_numbers, set_of
from vlmtune.preflight.memory import Memory, memory_of
from vlmtune.preflight.model import MetaModel, Trained
from vlmtune.preflight.sets import CheckedSet
from vlmtune.preflight.table import GOOD, NOT_ENCODED, TOO_LONG
from vlmtune.recipe.schema import Recipe
from vlmtune.train.build import epochs_of


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
        partial(_step_rows, order=order, batch_size=batch_size),
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


def _step_rows(step: int, *, order: Order, batch_size: int) -> Sequence[int]:
    return step_samples(step, order=order, batch_size=batch_size)
