"""A fixed random choice of samples: the same whenever it is made of the same samples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def fixed_subset(items: Sequence[Item], num: int | None, *, seed: int) -> list[Item]:
    """`num` of `items` in their order, chosen by `seed` alone; all where there are no more."""
    if num is None or num >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), num))]
