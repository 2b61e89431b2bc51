"""What the name of a figure says about it, for whoever compares two values of it."""

from __future__ import annotations

LOWER_IS_BETTER = ("loss", "rank", "unparsed")
"""How the names of figures end that are better where they are lower (`median_rank`)."""


def is_lower_better(figure: str) -> bool:
    return figure.endswith(LOWER_IS_BETTER)
