"""Plans which samples form a micro-batch, and builds it as a pack or as padded rows.

    shuffled epochs, one after the other (order.py)  ->  steps of `batch_size` samples
      ->  one share per process
      ->  micro-batches within a budget: packs, or padded rows of similar lengths

Nothing here keeps state, so a resumed run finds its place from the step number alone.

Letters: B rows, T tokens of the longest row, N tokens of a pack, S supervised tokens.

samples -> plan within the budget -> pack | collate -> Batch
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vlmtune.data.order import Order
from vlmtune.data.types import IGNORED, Batch, Sample


@dataclass(frozen=True)
class Budget:
    """What a micro-batch of several samples may hold; `supervised` None: any number."""

    tokens: int
    supervised: int | None = None

    def takes(self, tokens: int, supervised: int) -> bool:
        return tokens <= self.tokens and (self.supervised is None or supervised <= self.supervised)

    def holds(self, pack: Sequence[int], lengths: Sequence[int], supervised: Sequence[int]) -> bool:
        """Whether the samples at the positions `pack` fit the budget without padding."""
        return self.takes(sum(lengths[at] for at in pack), sum(supervised[at] for at in pack))


def num_steps(epochs: float, num_samples: int, batch_size: int) -> int:
    """Optimizer steps that `epochs` passes take; the last step may be smaller."""
    return math.ceil(_stream_length(epochs, num_samples) / batch_size)


def step_samples(
    step: int, *, order: Order, batch_size: int, epochs: float | None = None
) -> list[int]:
    """The rows of optimizer step `step` (1-based), in the order of the stream.

    The stream is the concatenation of the shuffled epochs. With `epochs` it ends after that many
    passes and the last step holds the rest; without, every step is full.
    """
    assert step >= 1 and batch_size >= 1
    start, stop = (step - 1) * batch_size, step * batch_size
    if epochs is not None:
        stop = min(stop, _stream_length(epochs, order.num_per_epoch))
    return [order.row_at(place) for place in range(start, stop)]


def balanced_shares(work: Sequence[float], world_size: int) -> list[list[int]]:
    """Positions in `work` for each process, so that the sums of their work are close.

    Heaviest first, each to the process with the least so far (Graham 1969, SIAM J. Appl. Math. 17,
    "longest processing time": at most 4/3 of the best possible). A share is in ascending order;
    with as many positions as processes none is empty.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    heap = [(0.0, 0, rank) for rank in range(world_size)]
    for position in sorted(range(len(work)), key=lambda at: (-work[at], at)):
        done, count, rank = heapq.heappop(heap)
        shares[rank].append(position)
        heapq.heappush(heap, (done + work[position], count + 1, rank))
    return [sorted(share) for share in shares]


def share_mark(positions: Iterable[int]) -> int:
    """The mark of a share. The marks of all shares of a step add up to that of the whole step,
    unless a position is missing or in two shares."""
    return sum(zlib.crc32(position.to_bytes(8, "big")) for position in positions)


def plan_packs(
    lengths: Sequence[int], supervised: Sequence[int], *, budget: Budget
) -> list[list[int]]:
    """Positions in `lengths`, grouped into packs within the budget, of about the same size.

    The number of packs is what first-fit decreasing needs (Johnson 1973: at most 11/9 of the least
    possible, and one more); the samples are then spread over as many packs evenly where that keeps
    the budget, so that the largest, which decides the memory, is small. A sample over the budget
    stands alone. Largest pack first: a lack of memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    packs = _first_fit(order, lengths, supervised, budget)
    even = [list(share) for share in balanced_shares(lengths, len(packs))] if packs else []
    if all(len(p) == 1 or budget.holds(p, lengths, supervised) for p in even):
        packs = even
    packs = [sorted(pack) for pack in packs if pack]
    return sorted(packs, key=lambda pack: (-sum(lengths[at] for at in pack), pack))


def _first_fit(
    order: Sequence[int], lengths: Sequence[int], supervised: Sequence[int], budget: Budget
) -> list[list[int]]:
    packs: list[list[int]] = []
    for position in order:
        for pack in packs:
            if budget.holds([*pack, position], lengths, supervised):
                pack.append(position)
                break
        else:
            packs.append([position])
    return packs


def plan_padded(
    lengths: Sequence[int], supervised: Sequence[int], *, budget: Budget
) -> list[list[int]]:
    """Positions in `lengths`, grouped so that rows times the longest row keeps the budget, and the
    supervised tokens theirs.

    Longest first, so that padding is small and a lack of memory shows at once. A sample over the
    budget stands alone.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    groups: list[list[int]] = []
    for position in order:
        if groups:
            group = [*groups[-1], position]
            tokens = len(group) * lengths[group[0]]
            if budget.takes(tokens, sum(supervised[at] for at in group)):
                groups[-1] = group
                continue
        groups.append([position])
    return groups


def _stream_length(epochs: float, num_samples: int) -> int:
    # 0.1 * 30 is 3.0000000000000004: without rounding, a step of its own.
    return math.ceil(round(epochs * num_samples, 6))


MediaLayout = Literal["flat", "stacked"]


def pack(samples: Sequence[Sample], *, image_batching: MediaLayout) -> Batch:
    """One row without padding, (1, N): the samples one after the other.

    The model's caller keeps them apart, by their `lengths`.
    """
    targets = torch.cat([sample.targets for sample in samples])  # (N,)
    supervised = targets != IGNORED
    names = _token_field_names(samples)
    inputs = {"input_ids": torch.cat([sample.input_ids for sample in samples])[None]}
    for name in names:
        inputs[name] = torch.cat([sample.token_fields[name] for sample in samples])[None]
    inputs.update(_media(samples, image_batching, one_row=True))
    return Batch(
        inputs=inputs,
        supervised=supervised[None],
        targets=targets[supervised],
        sample_ids=tuple(sample.id for sample in samples),
        num_tokens=int(targets.numel()),
        num_images=sum(sample.num_images for sample in samples),
        weights=_weights(samples),
        lengths=tuple(sample.num_tokens for sample in samples),
        media_keys=_media_keys(samples),
    )


def collate(samples: Sequence[Sample], *, pad_token_id: int, image_batching: MediaLayout) -> Batch:
    """Right-padded rows; padding is neither attended to nor supervised.

    `flat` media are concatenated over the samples on dimension 0; `stacked` media get one row a
    sample, (B, most pictures, …), padded with zeros.
    """
    targets = _pad([sample.targets for sample in samples], IGNORED, left=False)  # (B, T)
    supervised = targets != IGNORED  # (B, T)
    return Batch(
        inputs=_inputs(samples, pad_token_id, image_batching, left=False),
        supervised=supervised,
        targets=targets[supervised],
        sample_ids=tuple(sample.id for sample in samples),
        num_tokens=sum(sample.num_tokens for sample in samples),
        num_images=sum(sample.num_images for sample in samples),
        weights=_weights(samples),
        media_keys=_media_keys(samples),
    )


def _media_keys(samples: Sequence[Sample]) -> tuple[str, ...]:
    return tuple(key for sample in samples for key in sample.media_keys)


def _weights(samples: Sequence[Sample]) -> torch.Tensor | None:
    """The weights (S,) of the supervised tokens, row by row; None where no sample has any."""
    if all(sample.weights is None for sample in samples):
        return None
    rows = []
    for sample in samples:
        weights = sample.weights
        if weights is None:
            weights = torch.ones(sample.num_tokens, dtype=torch.float32)
        rows.append(weights[sample.targets != IGNORED])
    return torch.cat(rows)


def collate_prompts(
    samples: Sequence[Sample], *, pad_token_id: int, image_batching: MediaLayout
) -> dict[str, torch.Tensor]:
    """Left-padded rows, as `generate` needs them: every row's last token is its prompt's."""
    return _inputs(samples, pad_token_id, image_batching, left=True)


def _inputs(
    samples: Sequence[Sample], pad_token_id: int, image_batching: MediaLayout, *, left: bool
) -> dict[str, torch.Tensor]:
    names = _token_field_names(samples)
    ids = [sample.input_ids for sample in samples]
    inputs = {
        "input_ids": _pad(ids, pad_token_id, left=left),  # (B, T)
        "attention_mask": _pad([torch.ones_like(row) for row in ids], 0, left=left),  # (B, T)
    }
    for name in names:
        inputs[name] = _pad([sample.token_fields[name] for sample in samples], 0, left=left)
    inputs.update(_media(samples, image_batching))
    return inputs


def _token_field_names(samples: Sequence[Sample]) -> list[str]:
    assert samples, "an empty micro-batch"
    names = set(samples[0].token_fields)
    assert all(set(sample.token_fields) == names for sample in samples), "token fields differ"
    return sorted(names)


def _pad(rows: Sequence[torch.Tensor], value: int, *, left: bool) -> torch.Tensor:
    longest = max(row.shape[0] for row in rows)
    padded = rows[0].new_full((len(rows), longest), value)  # (B, T)
    for index, row in enumerate(rows):
        length = row.shape[0]
        padded[index, longest - length if left else 0 : longest if left else length] = row
    return padded


def _media(
    samples: Sequence[Sample], layout: MediaLayout, *, one_row: bool = False
) -> dict[str, torch.Tensor]:
    """`one_row`: of a pack; `stacked` media are then (1, all pictures, …)."""
    names = sorted({name for sample in samples for name in sample.media})
    if layout == "flat":
        return {
            name: torch.cat([sample.media[name] for sample in samples if name in sample.media])
            for name in names
        }
    if one_row:
        return {name: _in_one_row([s.media[name] for s in samples if s.media]) for name in names}
    return {name: _stack([sample.media.get(name) for sample in samples]) for name in names}


def _in_one_row(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows (1, pictures, …) as one (1, all pictures, …), each picture padded with zeros."""
    pictures = [picture for row in rows for picture in row[0]]
    sizes = [max(sizes) for sizes in zip(*(picture.shape for picture in pictures))]
    together = pictures[0].new_zeros((1, len(pictures), *sizes))
    for index, picture in enumerate(pictures):
        corner = together[0, index]
        for dim, size in enumerate(picture.shape):
            corner = corner.narrow(dim, 0, size)
        corner.copy_(picture)
    return together


def _stack(rows: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Rows of shape (1, pictures, …) as (B, most pictures, …); a missing row is all zeros.

    Idefics3-style models drop pictures that are zero throughout, so a text-only row costs nothing.
    """
    present = [row for row in rows if row is not None]
    sizes = [max(row.shape[dim] for row in present) for dim in range(1, present[0].dim())]
    stacked = present[0].new_zeros((len(rows), *sizes))
    for index, row in enumerate(rows):
        if row is not None:
            assert row.shape[0] == 1, "a stacked sample has one row"
            corner = stacked[index]
            for dim, size in enumerate(row.shape[1:]):
                corner = corner.narrow(dim, 0, size)
            corner.copy_(row[0])
    return stacked


@dataclass(frozen=True)
class BatchLayout:
    """How samples lie side by side. `packs`: the model keeps the samples of one row apart."""

    budget: Budget
    pad_token_id: int
    image_batching: MediaLayout
    packs: bool


def make_batches(samples: Sequence[Sample], layout: BatchLayout) -> list[Batch]:
    """Micro-batches that hold each of `samples` once, largest first."""
    lengths = [sample.num_tokens for sample in samples]
    supervised = [sample.num_supervised for sample in samples]
    plan = plan_packs if layout.packs else plan_padded
    groups = plan(lengths, supervised, budget=layout.budget)
    return [make_batch([samples[at] for at in group], layout) for group in groups]


def make_batch(samples: Sequence[Sample], layout: BatchLayout) -> Batch:
    """One micro-batch of all of `samples`."""
    if layout.packs:
        return pack(samples, image_batching=layout.image_batching)
    return collate(samples, pad_token_id=layout.pad_token_id, image_batching=layout.image_batching)
