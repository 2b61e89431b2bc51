"""Which samples make up which step, process and micro-batch: pure functions of order and lengths.

    shuffled epochs, one after the other (order.py)  ->  steps of `batch_size` samples
      ->  one share per process
      ->  micro-batches of similar lengths within a token budget

Nothing here keeps state, so a resumed run finds its place from the step number alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmtune.data.order import Order


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


def process_share(indices: Sequence[int], *, rank: int, world_size: int) -> list[int]:
    """What process `rank` takes of a step; the shares partition it, equal to within one."""
    assert 0 <= rank < world_size
    return list(indices[rank::world_size])


def plan_micro_batches(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Positions in `lengths`, grouped so that rows times the longest row keeps the budget.

    Longest first, so that padding is small and a lack of memory shows at once. A sample longer
    than the budget stands alone.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    groups: list[list[int]] = []
    for position in order:
        if groups:
            longest = lengths[groups[-1][0]]
            if (len(groups[-1]) + 1) * longest <= micro_batch_tokens:
                groups[-1].append(position)
                continue
        groups.append([position])
    return groups


def _stream_length(epochs: float, num_samples: int) -> int:
    # 0.1 * 30 is 3.0000000000000004: without rounding, a step of its own.
    return math.ceil(round(epochs * num_samples, 6))
