"""What is done with a sample of more than `max_tokens` tokens, if anything is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from vlmtune.data.types import IGNORED, Sample

SHRUNK = "pictures shrunk to fit data.max_tokens"
TRIMMED = "text cut at the end to fit data.max_tokens"
TURNS_LEFT_OUT = "last turns left out to fit data.max_tokens"

_SMALLEST_SIDE = 4
_REFINEMENTS = 4


def shrink_images(
    encode: Callable[[float], Sample],
    sample: Sample,
    *,
    num_text_tokens: int,
    shortest_side: int,
    max_tokens: int,
) -> Sample | None:
    """The sample with its pictures' sides scaled down until it fits, or None if it never does.

    `encode(scale)` gives the sample at a scale in (0, 1]; `shortest_side` is that of the smallest
    picture, in pixels.
    """
    too_large, scale = 1.0, 1.0
    room = max_tokens - num_text_tokens
    if room <= 0 or not (sample.num_images or sample.num_videos):
        return None
    while sample.num_tokens > max_tokens:
        too_large = scale
        wanted = math.sqrt(room / (sample.num_tokens - num_text_tokens))
        scale *= min(wanted, 0.9)
        if scale * shortest_side < _SMALLEST_SIDE:
            return None
        sample = encode(scale)
    # The first guess may have overshot by far: the processor has a pixel budget of its own.
    for _ in range(_REFINEMENTS):
        middle = math.sqrt(too_large * scale)
        candidate = encode(middle)
        if candidate.num_tokens <= max_tokens:
            sample, scale = candidate, middle
        else:
            too_large = middle
    return replace(sample, notes=(*sample.notes, SHRUNK))


def cut_text(sample: Sample, *, media_end: int, max_tokens: int) -> Sample | None:
    """The first `max_tokens` tokens; None where that cuts a picture or leaves nothing to learn.

    `media_end` is the position after the last picture. The last token kept predicts nothing: an
    answer that was cut is not taught to end there.
    """
    if max_tokens < media_end:
        return None
    targets = sample.targets[:max_tokens].clone()
    targets[-1] = IGNORED
    if not bool((targets != IGNORED).any()):
        return None
    return replace(
        sample,
        input_ids=sample.input_ids[:max_tokens].clone(),
        targets=targets,
        weights=None if sample.weights is None else sample.weights[:max_tokens].clone(),
        token_fields={n: f[:max_tokens].clone() for n, f in sample.token_fields.items()},
        notes=(*sample.notes, TRIMMED),
    )
