"""Numbers as JSON has them: without NaN and infinities, which become null."""

from __future__ import annotations

import math
from collections.abc import Mapping


def finite_or_null(value: object) -> object:
    """`value` with every NaN and infinity in it as None. Python's own JSON would hold the words
    `NaN` and `Infinity`, on which other readers stop."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
