"""Which samples make up which step, process and micro-batch: pure functions of order and lengths.

    shuffled epochs, one after the other (order.py)  ->  steps of `batch_size` samples
      ->  one share per process
      ->  micro-batches within a budget: packs, or padded rows of similar lengths

Nothing here keeps state, so a resumed run finds its place from the step number alone.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlmtune.data.order import Order


@dataclass(frozen=True)
class Budget:
    """What a micro-batch of several samples may hold; `supervised` None: any number."""

    tokens: int
    supervised: int | None = None

    def takes(self, tokens: int, supervised: int) -> bool:
        return tokens <= self.tokens and (self.supervised is None or supervised <= self.supervised)

    def holds(self, pack: Sequence[int], lengths: Sequence[int], supervised: Sequence[int]) -> bool:
        """Whether the samples at the positions `pack` fit, without padding."""
        return self.takes(sum(lengths[at] for at in pack), sum(supervised[at] for at in pack))


def num_steps(epochs: float, num_samples: int, batch_size: int) -> int:
    """Optimizer steps that `epochs` passes take; the last step may be smaller."""
    return math.ceil(_stream_length(epochs, num_samples) / batch_size)


def step_samples(
    step: int, *, order: Order, batch_size: int, epochs: float | None = None
) -> list[int]:
    """The rows of optimizer step `step` (1-based), in the order of the stream.

    The stream is the concatenation of the shuffled epochs. With `epochs` it ends after so many
    passes, so that the last step holds what is left; without, every step is full.
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
    """Of a share. The marks of all shares of a step add up to that of the whole step; those of
    shares in which a position is missing, or there twice, do not."""
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
