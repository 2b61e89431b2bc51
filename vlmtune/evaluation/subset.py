"""A fixed random choice of samples: the same whenever it is made of the same samples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from vlmtune.errors import VlmtuneError

Item = TypeVar("Item")


def fixed_subset(items: Sequence[Item], num: int | None, *, seed: int) -> list[Item]:
    """`num` of `items` in their order, chosen by `seed` alone; all where there are no more."""
    if num is None or num >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), num))]


def check_some_left(key: str, *, num_left: int, num_given: int) -> None:
    """Raise VlmtuneError where none of the samples under a key of the recipe can be used: nothing
    would be measured, and it would not be seen."""
    if num_given and not num_left:
        raise VlmtuneError(
            f"{key}: no sample is left to evaluate on",
            got=f"{num_given:,} of {num_given:,} left out",
            do="`vlmtune check` says what is wrong with each",
        )
