"""Edit distance and longest common subsequence, a column of the table in one integer operation.

Myers 1999 (Journal of the ACM 46(3)) in the form of Hyyrö 2003 ("A bit-vector algorithm for
computing Levenshtein and Damerau edit distances") and Hyyrö 2004 ("Bit-parallel LCS-length
computation revisited"). The usual table has len(a) x len(b) cells filled one by one; here bit i of
an integer stands for row i, so that a long answer costs no more than its length.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and substitutions that turn `a` into `b` (Levenshtein)."""
    if not a:
        return len(b)
    rows = _rows_of(a)
    every = (1 << len(a)) - 1
    last = 1 << (len(a) - 1)
    # Bit i: the cell of row i is one more (up) or one less (down) than that of row i - 1.
    up, down = every, 0
    distance = len(a)
    for item in b:
        equal = rows.get(item, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right = down | (every & ~(diagonal | up))  # one more than the cell to the left
        left = up & diagonal  # one less
        distance += bool(right & last) - bool(left & last)
        right = (right << 1) | 1  # row 0 grows by one a column
        left <<= 1
        vertical = equal | down
        up = every & (left | ~(vertical | right))
        down = every & right & vertical
    return distance


def common_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence of `a` and `b`."""
    rows = _rows_of(a)
    every = (1 << len(a)) - 1
    # Bit i is 0 where the length grows from row i - 1 to row i.
    flat = every
    for item in b:
        matched = flat & rows.get(item, 0)
        flat = every & ((flat + matched) | (flat - matched))
    return len(a) - flat.bit_count()


def _rows_of(a: Sequence[Hashable]) -> dict[Hashable, int]:
    """For each item the rows it stands in, as bits."""
    rows: dict[Hashable, int] = {}
    for number, item in enumerate(a):
        rows[item] = rows.get(item, 0) | (1 << number)
    return rows
