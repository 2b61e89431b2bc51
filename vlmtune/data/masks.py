"""Which tokens are supervised: the answers' characters as targets, checked by decoding.

T tokens of a sample.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch

from vlmtune.data.alignment import Segment, tokens_of_span
from vlmtune.data.template import Rendered, Span
from vlmtune.data.text import shorten
from vlmtune.data.types import IGNORED
from vlmtune.errors import VlmtuneError

NORMALISED = "characters replaced by the tokenizer's Unicode normalisation"


class MaskError(VlmtuneError):
    """An answer cannot be found among the tokens, or is not what they spell; without a place."""


def label_targets(
    rendered: Rendered,
    offsets: Sequence[tuple[int, int]],
    segments: Sequence[Segment],
    input_ids: torch.Tensor,
    *,
    end_token: str,
    tokenizer: Any,
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Targets (T,), shifted by one, of every span of `rendered`; and notes on what was changed.

    `offsets` are the characters of each token of `rendered.text`; `segments` say where these
    tokens stand in `input_ids` (T,). Raises MaskError where the targets, decoded, are not the
    answer and its end of turn.
    """
    targets = torch.full_like(input_ids, IGNORED)
    notes: list[str] = []
    for span in rendered.spans:
        first, last = _positions(span, offsets, segments)
        taught = input_ids[first : last + 1]
        expected = rendered.text[span.start : span.end]
        if not span.end_is_rendered:
            # Taught in place of what the template goes on with, which is not an end.
            end_id = tokenizer.convert_tokens_to_ids(end_token)
            taught = torch.cat([taught, taught.new_tensor([end_id])])
            expected += end_token
        targets[first - 1 : first - 1 + len(taught)] = taught
        decoded = _decode_after(int(input_ids[first - 1]), taught.tolist(), tokenizer)
        if decoded != expected:
            _check_normalised(decoded, expected)
            notes.append(NORMALISED)
    return targets, tuple(notes)


def _positions(
    span: Span, offsets: Sequence[tuple[int, int]], segments: Sequence[Segment]
) -> tuple[int, int]:
    """The span's first and last position in the processor's tokens."""
    found = tokens_of_span(offsets, span.start, span.end)
    assert found is not None and found[0] > 0, "an answer needs a token, and one before it"
    segment = next(segment for segment in reversed(segments) if segment.start <= found[0])
    if segment.placed is None:
        raise MaskError("an answer could stand in two places among the tokens")
    return found[0] - segment.start + segment.placed, found[1] - segment.start + segment.placed


def _decode_after(before: int, ids: list[int], tokenizer: Any) -> str:
    """`ids` as text, behind the token before them: decoders drop a text's first space."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    head = tokenizer.decode([before], **options)
    return str(tokenizer.decode([before, *ids], **options)).removeprefix(head)


def _check_normalised(decoded: str, expected: str) -> None:
    if decoded not in [unicodedata.normalize(form, expected) for form in ("NFC", "NFKC")]:
        raise MaskError(
            "the supervised tokens do not spell the answer",
            got=repr(shorten(decoded)),
            expected=repr(shorten(expected)),
        )
