"""Where each token that the model sees stands in the rendered text.

A processor writes a picture or a video out as many tokens, with rows, columns, borders and times
in some families, where the text has one placeholder. Most processors say which characters they
wrote in place of which (`align_by_characters`). Of one that does not, the tokens between two
pictures are those that its tokenizer alone gives, which is what places them (`align_by_tokens`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

Offsets = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Alignment:
    """`offsets`: of each token that the model sees, its characters [start, end) of the rendered
    text; (0, 0) for a picture's or a video's, for one that the tokenizer adds itself, and for one
    whose place is not certain. `media_end`: the position after the last picture or video."""

    offsets: Offsets
    num_media_tokens: int = 0
    media_end: int = 0


def align_by_characters(written: Offsets, replacements: Sequence[Mapping[str, Any]]) -> Alignment:
    """From the tokens' characters of the text as the processor wrote it out.

    `replacements`, in order, have the characters of a placeholder (`span`) and what stands in its
    place (`new_span`). Of a token that is part placeholder, part text, the text counts.
    """
    offsets: list[tuple[int, int]] = []
    num_media, media_end, number, shift = 0, 0, 0, 0
    for position, (start, end) in enumerate(written):
        while number < len(replacements) and replacements[number]["new_span"][1] <= start:
            shift = replacements[number]["new_span"][1] - replacements[number]["span"][1]
            number += 1
        if number == len(replacements) or end <= replacements[number]["new_span"][0]:
            offsets.append((start - shift, end - shift) if end > start else (0, 0))
            continue
        (old_start, old_end), (new_start, new_end) = (
            replacements[number][key] for key in ("span", "new_span")
        )
        media_end = position + 1
        if start >= new_start and end <= new_end:
            num_media += 1
            offsets.append((0, 0))
        else:
            first = start - shift if start < new_start else old_end
            last = old_start if end <= new_end else old_end + end - new_end
            offsets.append((first, max(first, last)))
    return Alignment(offsets, num_media, media_end)


def align_by_tokens(
    plain: Sequence[int],
    offsets: Offsets,
    processed: Sequence[int],
    image_token_id: int,
    *,
    text: str = "",
) -> Alignment | None:
    """From the tokens `plain` of `text`, one a picture, and their characters `offsets`; None where
    `processed`, the model's, are not the same outside the pictures.

    The first word after a picture may be others: some processors write a space before it. It then
    has no characters.
    """
    segments = align_segments(plain, processed, image_token_id)
    if segments is None:
        words = _first_words(plain, offsets, image_token_id, text)
        segments = align_segments(plain, processed, image_token_id, left_out=words)
    if segments is None:
        return None
    placed: list[tuple[int, int]] = [(0, 0)] * len(processed)
    for start, length, at in segments:
        if at is not None:
            placed[at : at + length] = offsets[start : start + length]
    has_media = len(segments) > 1
    return Alignment(
        placed,
        num_media_tokens=len(processed) - (len(plain) - len(segments) + 1),
        media_end=len(processed) - segments[-1].length if has_media else 0,
    )


class Segment(NamedTuple):
    """A text between pictures: its start and length in the plain tokens, its place in the others.

    `placed` is None where it could stand in several places (a line break between two pictures).
    """

    start: int
    length: int
    placed: int | None


def align_segments(
    plain: Sequence[int],
    processed: Sequence[int],
    image_token_id: int,
    *,
    left_out: Collection[int] = (),
) -> list[Segment] | None:
    """The texts between pictures, in order, without the tokens `left_out` (positions) at their
    starts; None where the two sequences do not agree.

    A text is placed where its leftmost and its rightmost possible place are the same.
    """
    bounds = [-1, *(i for i, token in enumerate(plain) if token == image_token_id), len(plain)]
    starts = [bound + 1 for bound in bounds[:-1]]
    starts = [next(i for i in count(start) if i not in left_out) for start in starts]
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


def _first_words(
    plain: Sequence[int], offsets: Offsets, image_token_id: int, text: str
) -> set[int]:
    """The positions in `plain` of what directly follows a picture, up to the end of a word."""
    found: set[int] = set()
    for position, (start, _) in enumerate(offsets):
        if plain[position] == image_token_id or position == 0:
            continue
        follows = plain[position - 1] == image_token_id and not text[start : start + 1].isspace()
        if follows or (position - 1 in found and text[start : start + 1].isalnum()):
            found.add(position)
    return found


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


def tokens_of_span(offsets: Offsets, start: int, end: int) -> tuple[int, int] | None:
    """First and last token that overlap the characters [start, end).

    Tokens without width between them (spaces, in some tokenizers) belong to the span; special
    tokens that the tokenizer adds itself have the offsets (0, 0) and never do.
    """
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    return (inside[0], inside[-1]) if inside else None
