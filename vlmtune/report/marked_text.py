"""A sample's tokens as text in which one sees what is supervised.

    input_ids (T,), targets (T,) -> runs of one kind -> text of each run

T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmtune.data.types import IGNORED, Sample

MAX_CHARACTERS = 2000
MAX_PIECES = 40


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered sample; `kind` is `plain`, `taught` (supervised), `picture` or
    `video`."""

    kind: str
    text: str


def marked_pieces(sample: Sample, tokenizer: Any, image_id: int) -> tuple[Piece, ...]:
    """The sample's text with what is taught marked and each run of picture tokens counted; long
    texts shortened."""
    pieces = _pieces(sample, tokenizer, {image_id: "picture"}, "[picture: {count} tokens]")
    return _shortened(pieces)


def whole_pieces(sample: Sample, tokenizer: Any, media_ids: Mapping[int, str]) -> tuple[Piece, ...]:
    """The same, nothing left out, each run of media tokens as `<token> x 437`. `media_ids`: the
    kinds of the ids that stand for pictures and videos."""
    return tuple(_pieces(sample, tokenizer, media_ids, "{token} x {count}"))


def _pieces(
    sample: Sample, tokenizer: Any, media_ids: Mapping[int, str], wording: str
) -> list[Piece]:
    pieces: list[Piece] = []
    before: list[int] = []
    for kind, ids in _runs(sample, media_ids):
        if kind in ("plain", "taught"):
            text = _decode_after(before, ids, tokenizer)
        else:
            token = str(tokenizer.convert_ids_to_tokens(ids[0]))
            text = wording.format(token=token, count=len(ids))
        before = ids[-1:]
        pieces.append(Piece(kind, text))
    return pieces


def _runs(sample: Sample, media_ids: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """Consecutive ids of one kind. A target is what is taught after a position: mostly the next
    token, and where the template writes no end of a turn, an end that is in no input."""
    ids, targets = sample.input_ids.tolist(), sample.targets.tolist()
    runs: list[tuple[str, list[int]]] = []

    def put(kind: str, token: int) -> None:
        if runs and runs[-1][0] == kind:
            runs[-1][1].append(token)
        else:
            runs.append((kind, [token]))

    taught = IGNORED
    for token, target in zip([*ids, None], [*targets, IGNORED]):
        if taught != IGNORED:
            put("taught", taught)
        if token is not None and token != taught:
            put(media_ids.get(token, "plain"), token)
        taught = target
    return runs


def _decode_after(before: list[int], ids: list[int], tokenizer: Any) -> str:
    # Decoders drop a text's first space: the token before keeps it.
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    head = str(tokenizer.decode(before, **options)) if before else ""
    return str(tokenizer.decode([*before, *ids], **options)).removeprefix(head)


def _shortened(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """`pieces` with the middle of long plain texts and the end of long answers left out."""
    half = MAX_CHARACTERS // (2 * max(1, min(len(pieces), 8)))
    kept = []
    for piece in pieces[:MAX_PIECES]:
        text = piece.text
        if len(text) > 2 * half:
            text = f"{text[:half]} … {text[-half:]}"
        kept.append(Piece(piece.kind, text))
    if len(pieces) > MAX_PIECES:
        kept.append(Piece("plain", f" … and {len(pieces) - MAX_PIECES} more stretches"))
    return tuple(kept)
