"""Where each token of a text stands once the processor has written out its pictures.

The tokenizer alone gives one placeholder token a picture, with character offsets; the processor
gives many tokens a picture (with rows, columns and borders in some families), without. The text
between two pictures is the same token for token in both, which is what places it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """A text between pictures: its start and length in the plain tokens, its place in the others.

    `placed` is None where it could stand in several places (a line break between two pictures).
    """

    start: int
    length: int
    placed: int | None


def align_segments(
    plain: Sequence[int], processed: Sequence[int], image_token_id: int
) -> list[Segment] | None:
    """The texts between pictures, in order; None where the two sequences do not agree.

    A text is placed where its leftmost and its rightmost possible place are the same.
    """
    bounds = [-1, *(i for i, token in enumerate(plain) if token == image_token_id), len(plain)]
    starts = [bound + 1 for bound in bounds[:-1]]
    texts = [list(plain[start:stop]) for start, stop in zip(starts, bounds[1:], strict=True)]
    leftmost = _place(texts, list(processed), image_token_id)
    backwards = _place([t[::-1] for t in texts[::-1]], list(processed[::-1]), image_token_id)
    if leftmost is None or backwards is None:
        return None
    rightmost = [
        len(processed) - start - len(text)
        for start, text in zip(backwards[::-1], texts, strict=True)
    ]
    return [
        Segment(start, len(text), left if left == right else None)
        for start, text, left, right in zip(starts, texts, leftmost, rightmost, strict=True)
    ]


def _place(texts: list[list[int]], ids: list[int], image_token_id: int) -> list[int] | None:
    """The leftmost start of each text, with a picture's tokens between any two."""
    if len(texts) == 1:
        return [0] if texts[0] == ids else None
    if ids[: len(texts[0])] != texts[0]:
        return None
    placed = [0]
    position = len(texts[0])
    for number, text in enumerate(texts[1:], start=2):
        try:
            position = ids.index(image_token_id, position) + 1
        except ValueError:
            return None
        if number == len(texts):
            start = len(ids) - len(text)
            if start < position or ids[start:] != text:
                return None
        else:
            found = _find(ids, text, position)
            if found is None:
                return None
            start = found
        placed.append(start)
        position = start + len(text)
    return placed


def _find(ids: list[int], text: list[int], position: int) -> int | None:
    for start in range(position, len(ids) - len(text) + 1):
        if ids[start : start + len(text)] == text:
            return start
    return None


def tokens_of_span(
    offsets: Sequence[tuple[int, int]], start: int, end: int
) -> tuple[int, int] | None:
    """First and last token that overlap the characters [start, end).

    Tokens without width between them (spaces, in some tokenizers) belong to the span; special
    tokens that the tokenizer adds itself have the offsets (0, 0) and never do.
    """
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    return (inside[0], inside[-1]) if inside else None
