"""Which sample stands at each place of the training stream: a pure function of seed and counts.

    place in the stream -> epoch and place in it -> permutation of the epoch's slots
      -> the entry the slot belongs to, and which of its rows it holds

An entry of `n` rows and weight `w` fills `round(n * w)` slots of every epoch, and goes round its
rows in an order of its own: with weight 0.5 two epochs see every row once.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha512
from itertools import accumulate

SHUFFLED_OUTRIGHT = 1 << 16
"""Up to so many places a permutation is a shuffled list; beyond, computed place by place."""

_ROUNDS = 6
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Order:
    """The stream of the rows of some entries: `counts` are their rows, `weights` how often each is
    seen in an epoch. Rows are numbered through the entries, from 0."""

    seed: int
    counts: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.counts) == len(self.weights) and min(self.counts) > 0
        assert self.num_per_epoch > 0, "the weights give an epoch without samples"

    @classmethod
    def uniform(cls, seed: int, num_samples: int) -> Order:
        """Every one of `num_samples` once in an epoch."""
        return cls(seed, (num_samples,), (1.0,))

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of each entry in an epoch."""
        return tuple(num_slots(n, w) for n, w in zip(self.counts, self.weights, strict=True))

    @property
    def num_per_epoch(self) -> int:
        return sum(self.slots)

    def row_at(self, place: int) -> int:
        """The number of the row at `place` (0-based) of the stream."""
        epoch, place = divmod(place, self.num_per_epoch)
        slot = permuted(place, size=self.num_per_epoch, key=f"vlmtune:{self.seed}:{epoch}")
        ends = _ends(self.slots)
        entry = bisect_right(ends, slot)
        first_slot = ends[entry - 1] if entry else 0
        first_row = sum(self.counts[:entry])
        slot -= first_slot
        count, in_epoch = self.counts[entry], self.slots[entry]
        if in_epoch == count:
            return first_row + slot
        turn, place = divmod(epoch * in_epoch + slot, count)
        key = f"vlmtune:{self.seed}:entry {entry}:{turn}"
        return first_row + permuted(place, size=count, key=key)


def num_slots(count: int, weight: float) -> int:
    """How many slots of an epoch an entry of `count` rows fills."""
    return round(count * weight)


def permuted(place: int, *, size: int, key: str) -> int:
    """What stands at `place` of a permutation of range(size) that `key` chooses.

    Memory does not grow with `size`: above `SHUFFLED_OUTRIGHT` a Feistel network (Luby and Rackoff
    1988) over the next power of four, walked until it lands inside (Black and Rogaway 2002).
    """
    assert 0 <= place < size
    if size <= SHUFFLED_OUTRIGHT:
        return _shuffled(key, size)[place]
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = place >> half, place & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        place = left << half | right
        if place < size:
            return place


def chosen_entry(place: int, *, seed: int, weights: Sequence[float]) -> int:
    """The entry whose row stands at `place` of a stream that mixes entries by their weights."""
    if len(weights) == 1:
        return 0
    digest = sha512(f"vlmtune:{seed}:entry at {place}".encode()).digest()
    ends = list(accumulate(weights))
    point = int.from_bytes(digest[:8], "little") / (_MASK + 1) * ends[-1]  # in [0, sum)
    return min(bisect_right(ends, point), len(weights) - 1)


# One for each entry with a weight of its own, and the epoch's; 128 take at most 32 MB.
@lru_cache(maxsize=128)
def _shuffled(key: str, size: int) -> Sequence[int]:
    order = list(range(size))
    # A text seed is hashed with SHA-512, the same on every machine and Python version.
    random.Random(key).shuffle(order)
    return array("I", order)


@lru_cache(maxsize=64)
def _round_keys(key: str) -> tuple[int, ...]:
    digest = sha512(key.encode()).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def _mixed(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=8)
def _ends(slots: Sequence[int]) -> list[int]:
    return list(accumulate(slots))
