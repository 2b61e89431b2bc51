"""How long training goes on and what its largest micro-batch holds, from the measured lengths.

table of the rows -> the set that training reads -> its order -> steps -> micro-batches
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlmtune.data.dataset import SCANNED_OUTRIGHT, ConversationSet, OpenFile
from vlmtune.data.order import Order
from vlmtune.data.packing import Budget, plan_packs, plan_padded
from vlmtune.preflight.table import GOOD, NO_MEDIA, NOT_A_ROW, RowTable

MAX_STEPS = 5000
"""Steps whose micro-batches are looked at."""


@dataclass(frozen=True)
class MicroBatch:
    """`tokens`: with padding. `media`: those of them that stand for pictures."""

    rows: int
    longest: int
    supervised: int
    media: int

    @property
    def tokens(self) -> int:
        return self.rows * self.longest


@dataclass(frozen=True)
class Epoch:
    """One pass over the data; of weighted entries, what a pass holds on average."""

    samples: int
    steps: int
    tokens: int
    supervised_tokens: int
    image_tokens: int
    images: int


def set_of(files: Sequence[OpenFile], table: RowTable) -> ConversationSet:
    """The set as training opens it: without the rows that its reader finds bad, where it looks."""
    if len(table) > SCANNED_OUTRIGHT:
        return ConversationSet(tuple(files), (None,) * len(files))
    used = ~np.isin(np.frombuffer(table.states, dtype=np.uint8), (NOT_A_ROW, NO_MEDIA))
    kept: list[Sequence[int]] = []
    start = 0
    for file in files:
        kept.append(np.flatnonzero(used[start : start + len(file.rows)]).tolist())
        start += len(file.rows)
    return ConversationSet(tuple(files), tuple(kept))


def row_numbers(files: Sequence[OpenFile], conversations: ConversationSet) -> np.ndarray:
    """For each sample of the set, its row in the table."""
    numbers, start = [], 0
    for file, kept in zip(files, conversations.kept, strict=True):
        rows = np.arange(len(file.rows)) if kept is None else np.asarray(kept, dtype=np.int64)
        numbers.append(rows + start)
        start += len(file.rows)
    return np.concatenate(numbers) if numbers else np.empty(0, np.int64)


def epoch_of(
    table: RowTable,
    numbers: np.ndarray,
    order: Order,
    *,
    batch_size: int,
    num_per_epoch: int,
    scale: float,
) -> Epoch:
    """The figures of one pass over the samples `numbers` (rows of the table), times `scale`."""
    totals = np.zeros(4)
    start = 0
    for count, slots in zip(order.counts, order.slots, strict=True):
        rows = numbers[start : start + count]
        start += count
        totals += _sums(table, rows) * (slots / count) * scale
    tokens, supervised, media, images = (round(float(x)) for x in totals)
    return Epoch(
        samples=num_per_epoch,
        steps=-(-num_per_epoch // batch_size),
        tokens=tokens,
        supervised_tokens=supervised,
        image_tokens=media,
        images=images,
    )


def micro_batches(
    table: RowTable,
    numbers: np.ndarray,
    step_rows: Callable[[int], Sequence[int]],
    *,
    num_steps: int,
    budget: Budget,
    packs: bool,
) -> Iterator[MicroBatch]:
    """Every micro-batch of the first `MAX_STEPS` steps of one process. `step_rows(step)`: the
    samples of a step (1-based)."""
    lengths = table.row_lengths()
    for step in range(1, min(num_steps, MAX_STEPS) + 1):
        rows = [int(numbers[i]) for i in step_rows(step)]
        rows = [row for row in rows if table.states[row] == GOOD and len(lengths[row])]
        # Both sides of a pair are batched apart: the longer one decides.
        for side in range(max((len(lengths[row]) for row in rows), default=0)):
            of_side = [int(lengths[row][side]) for row in rows]
            supervised = [int(table.supervised[row]) for row in rows]
            plan = plan_packs if packs else plan_padded
            for group in plan(of_side, supervised, budget=budget):
                tokens = [of_side[at] for at in group]
                yield MicroBatch(
                    rows=1 if packs else len(group),
                    longest=sum(tokens) if packs else max(tokens),
                    supervised=sum(table.supervised[rows[at]] for at in group),
                    media=sum(table.media[rows[at]] for at in group) if side == 0 else 0,
                )


def _sums(table: RowTable, rows: np.ndarray) -> np.ndarray:
    """Tokens, supervised tokens, picture tokens and pictures of rows."""
    tokens = table.num_tokens()[rows].sum()
    others = [
        np.frombuffer(column, dtype=np.uint32)[rows].sum()
        for column in (table.supervised, table.media, table.images)
    ]
    return np.array([tokens, *others], dtype=float)
