"""Which tokens are supervised: the answers' characters as targets, checked by decoding.

T tokens of a sample.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

import torch

from vlmtune.data.alignment import Offsets, tokens_of_span
from vlmtune.data.template import Rendered, Span
from vlmtune.data.text import shorten
from vlmtune.data.types import IGNORED
from vlmtune.errors import VlmtuneError

NORMALISED = "characters replaced by the tokenizer's Unicode normalisation"


class MaskError(VlmtuneError):
    """An answer cannot be found among the tokens, or is not what they spell; without a place."""


@dataclass(frozen=True)
class Labels:
    """`targets` (T,) shifted by one; `weights` (T,) float32 of what each counts, or None where
    each counts 1."""

    targets: torch.Tensor
    weights: torch.Tensor | None
    notes: tuple[str, ...]


def label_targets(
    rendered: Rendered,
    offsets: Offsets,
    input_ids: torch.Tensor,
    *,
    end_token: str,
    tokenizer: Any,
) -> Labels:
    """The labels of every span of `rendered` with a weight; notes say what was changed.

    `offsets` are the characters of `rendered.text` of each of `input_ids` (T,). Raises MaskError
    where the targets, decoded, are not the answer and its end of turn.
    """
    targets = torch.full_like(input_ids, IGNORED)
    weights = torch.ones(input_ids.shape, dtype=torch.float32)
    notes: list[str] = []
    for span in rendered.spans:
        if span.weight == 0:
            continue
        first, last = _positions(span, offsets)
        taught = input_ids[first : last + 1]
        expected = rendered.text[span.start : span.end]
        if not span.end_is_rendered:
            # Taught in place of what the template goes on with, which is not an end.
            end_id = tokenizer.convert_tokens_to_ids(end_token)
            taught = torch.cat([taught, taught.new_tensor([end_id])])
            expected += end_token
        targets[first - 1 : first - 1 + len(taught)] = taught
        weights[first - 1 : first - 1 + len(taught)] = span.weight
        decoded = _decode_after(int(input_ids[first - 1]), taught.tolist(), tokenizer)
        if decoded != expected:
            _check_normalised(decoded, expected)
            notes.append(NORMALISED)
    is_weighted = any(span.weight not in (0, 1) for span in rendered.spans)
    return Labels(targets, weights if is_weighted else None, tuple(notes))


def _positions(span: Span, offsets: Offsets) -> tuple[int, int]:
    """The span's first and last position among the tokens."""
    found = tokens_of_span(offsets, span.start, span.end)
    if found is None:
        if span.start == span.end:
            raise MaskError("an answer is empty", expected="at least one character")
        raise MaskError("an answer could stand in two places among the tokens")
    if found[0] == 0:
        raise MaskError("an answer stands at the very start", expected="a token before it")
    return found


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
            do="take line breaks and spaces off the answer's ends",
        )
