"""How long training goes on, and how much memory it will take, from shapes and measured lengths.

table of the rows -> the set that training reads -> its order -> steps -> micro-batches

Letters: L layers, D width, M inputs and outputs of a layer's linear modules together, V
vocabulary, N tokens of a micro-batch with padding, S supervised tokens, a bytes of a number in the
compute dtype (2, or 4 in fp32).

    weights      numbers x their bytes: 4.127 bits (NF4 with its constants), 8 bits, or a
    trained      an adapter's numbers in float32; modules trained in full: 4 bytes instead of a
    gradients    4 bytes a trained number
    optimizer    8 bytes a trained number, or 2 with 8-bit state (8 in tensors below 4096 numbers)
    activations  of each tower that trains or lets gradients through
                   without checkpointing  N L k M a
                   with                   N L D a, and of the larger one a layer, N k M a
                 of a tower before anything that trains: a layer, where that is more
    logits       C V (12 + a): the logits, in float32, their log-softmax and its gradient, of as
                 many of the S rows as there are at once
    unpacking    the largest quantised weight in the compute dtype

Not counted: the libraries' own memory (0.5 to 1 GB of a process; a CUDA context as much on the
GPU), fragmentation, attention without a fused kernel; and of the host, the features that
`train.vision_cache` keeps and the copy of a checkpoint being written, which take no more than a
part of what is free. docs/check.md compares with measured peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from vlmtune.data.batches import Budget, plan_packs, plan_padded
from vlmtune.data.dataset import SCANNED_OUTRIGHT, ConversationSet, OpenFile
from vlmtune.data.order import Order
from vlmtune.models.forward import chunk_rows_of
from vlmtune.preflight.model import MetaModel, Tower, Trained
from vlmtune.preflight.sets import GOOD, NO_MEDIA, NOT_A_ROW, RowTable
from vlmtune.recipe.schema import Recipe

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


NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
NF4_BITS_SINGLE = 4 + 32 / 64
SMALL_TENSOR = 4096
KEPT_PER_LINEAR_NUMBER = 1.2
"""k: what a layer keeps, as a multiple of its linear modules' inputs and outputs; measured 0.9 to
1.3, by what trains."""


@dataclass(frozen=True)
class Memory:
    """Bytes, estimated; `total` is `memory_bytes`."""

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    unpacking: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def weight_bytes(recipe: Recipe, trained: Trained) -> dict[str, int]:
    """Bytes of the base model's weights by part, as loaded."""
    bits = {4: NF4_BITS if recipe.quantization.double_quant else NF4_BITS_SINGLE, 8: 8.0}
    quantized_bits = bits.get(recipe.quantization_bit, 0.0)
    number = number_bytes(recipe)
    return {
        part: round(
            count.quantized_parameters * quantized_bits / 8
            + (count.parameters - count.quantized_parameters) * number
        )
        for part, count in trained.parts.items()
    }


def optimizer_bytes(recipe: Recipe, trained: Trained) -> int:
    """Bytes of AdamW's two averages."""
    if not recipe.train.optimizer.endswith("8bit"):
        return 8 * trained.trainable_parameters
    return sum(size * (8 if size < SMALL_TENSOR else 2) for size in trained.sizes)


def number_bytes(recipe: Recipe) -> int:
    """Bytes of a number in the compute dtype."""
    return 4 if recipe.train.precision == "fp32" else 2


def memory_of(
    recipe: Recipe,
    meta: MetaModel,
    trained: Trained,
    batches: Iterable[MicroBatch],
    *,
    patches_per_media_token: float,
) -> Memory:
    """The estimate, with the micro-batch of `batches` that takes the most."""
    number = number_bytes(recipe)
    in_full = trained.in_full
    size = trained.trainable_parameters
    language = meta.towers["language"]
    vision = meta.towers.get("vision", Tower(0, 0, 0))
    # A connector comes after the tower: trained alone, it sends no gradient back into it.
    vision_trains = "vision" in trained.parts and trained.parts["vision"].trainable_parameters > 0
    activations, logits = 0, 0
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    for batch in batches:
        patches = round(batch.media * patches_per_media_token)
        taken = _kept_numbers(
            [(language, batch.tokens, True), (vision, patches, vision_trains)],
            checkpointing=recipe.train.gradient_checkpointing,
        )
        rows = min(batch.supervised, chunk_rows_of(meta.vocabulary, device_type))
        head = rows * meta.vocabulary * (12 + number)
        if taken * number + head > activations + logits:
            activations, logits = taken * number, head
    return Memory(
        weights=sum(weight_bytes(recipe, trained).values()),
        trained=4 * (size - in_full) + (4 - number) * in_full,
        gradients=4 * size,
        optimizer=optimizer_bytes(recipe, trained),
        activations=activations,
        logits=logits,
        unpacking=meta.largest_quantized * number,
    )


def _kept_numbers(towers: Sequence[tuple[Tower, int, bool]], *, checkpointing: bool) -> int:
    """Numbers that towers, each with its tokens, keep at their fullest moment. Of one that does
    not train (False), a layer at a time, before the others keep anything."""
    kept, layer_of_kept, passing = 0.0, 0.0, 0.0
    for tower, tokens, trains in towers:
        layer = tokens * KEPT_PER_LINEAR_NUMBER * tower.linear_numbers
        if not trains:
            passing = max(passing, layer)
        elif checkpointing:
            kept += tokens * tower.layers * tower.width
            layer_of_kept = max(layer_of_kept, layer)
        else:
            kept += tower.layers * layer
    return round(max(kept + layer_of_kept, passing))
