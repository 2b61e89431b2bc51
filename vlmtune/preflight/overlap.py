"""What the evaluation's samples share with the training's: warnings with counts and a place."""

from __future__ import annotations

from vlmtune.data.duplicates import Overlap, overlap
from vlmtune.errors import plural
from vlmtune.preflight.problems import Problems
from vlmtune.preflight.sets import CheckedSet


def add_overlap(train: CheckedSet, held_out: CheckedSet, problems: Problems) -> Overlap:
    """Warnings for pictures, and for pictures with their question, that both sets have."""
    found = overlap(train.table.digests, held_out.table.digests)
    table = held_out.table
    place = None
    if found.examples:
        place = table.source(table.digest_rows[found.examples[0]])
    file, line = (None, None) if place is None else (place.file, place.line)
    total = len(table.digests)
    if found.num_with_both:
        problems.add(
            "warning",
            f"{held_out.name}: {found.num_with_both:,} of {plural(total, 'sample')} with the "
            "question and the pictures of a training sample",
            file=file,
            line=line,
        )
    if found.num_with_picture:
        shown = (None, None) if found.num_with_both else (file, line)
        problems.add(
            "warning",
            f"{held_out.name}: also trained on: {plural(found.num_pictures, 'picture')}, in "
            f"{found.num_with_picture:,} of {plural(total, 'sample')}; `vlmtune data split` keeps "
            "each picture on one side",
            file=shown[0],
            line=shown[1],
        )
    return found
