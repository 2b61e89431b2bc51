"""Shows samples as the model sees them: rendered template, supervised text, picture sizes.

    input_ids (T,), targets (T,) -> runs of one kind -> text of each run

T tokens of a sample.

conversations -> Encoder -> Preview -> terminal (cli), or one self-contained page

Jinja escapes all text; the page runs no script and loads nothing.
"""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vlmtune import __version__
from vlmtune.data.encode import Encoder
from vlmtune.data.types import IGNORED, Conversation, Sample
from vlmtune.errors import VlmtuneError, escaped, plural
from vlmtune.files import write_file
from vlmtune.report.pictures import PictureSize, Thumbnail, Thumbnails, picture_sizes

MAX_CHARACTERS = 2000
MAX_PIECES = 40


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered sample; `kind` is `plain`, `taught` (supervised), `picture` or
    `video`."""

    kind: str
    text: str


def marked_pieces(sample: Sample, tokenizer: Any, image_id: int) -> tuple[Piece, ...]:
    """The sample's text with the supervised parts marked and each run of image tokens replaced by
    its length; long texts are shortened."""
    pieces = _pieces(sample, tokenizer, {image_id: "picture"}, "[picture: {count} tokens]")
    return _shortened(pieces)


def whole_pieces(sample: Sample, tokenizer: Any, media_ids: Mapping[int, str]) -> tuple[Piece, ...]:
    """The same without shortening, each run of media tokens as `<token> x 437`. `media_ids`: the
    kind of each id that stands for a picture or video."""
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
    """Consecutive ids of one kind. A target is the id to predict after a position: usually the next
    token, or an end of turn that the template does not write into the input."""
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
        kept.append(Piece("plain", f" … and {len(pieces) - MAX_PIECES} more pieces"))
    return tuple(kept)


BUDGET_BYTES = 20_000_000
"""Of the pictures of a page, as text."""


@dataclass(frozen=True)
class Preview:
    """One sample. `num_media` counts the tokens that stand for pictures and videos."""

    id: str
    file: str
    line: int
    pieces: tuple[Piece, ...]
    sizes: tuple[PictureSize, ...]
    num_tokens: int
    num_media: int
    num_supervised: int
    notes: tuple[str, ...]

    @property
    def counts(self) -> str:
        return (
            f"{plural(self.num_tokens, 'token')}, {self.num_media:,} of them for media, "
            f"{self.num_supervised:,} supervised"
        )


@dataclass(frozen=True)
class _Card:
    preview: Preview
    thumbnails: tuple[Thumbnail, ...]


def preview(conversation: Conversation, encoder: Encoder) -> Preview:
    """The sample that training makes of `conversation`. Raises SampleError as `encode` does."""
    sample = encoder.encode(conversation)
    media = _media_ids(encoder)
    pieces = whole_pieces(sample, encoder.processor.tokenizer, media)
    return Preview(
        id=conversation.id,
        file=conversation.source.file,
        line=conversation.source.line,
        pieces=pieces,
        sizes=picture_sizes(conversation, sample, encoder),
        num_tokens=sample.num_tokens,
        num_media=sum(int((sample.input_ids == token).sum()) for token in media),
        num_supervised=sample.num_supervised,
        notes=(*sample.notes, *_weights(sample)),
    )


def write_preview_page(
    shown: Sequence[tuple[Conversation, Preview]], output: Path, *, title: str
) -> None:
    """Write one page with the samples and their pictures. Raises VlmtuneError if it cannot."""
    thumbnails = Thumbnails(budget_bytes=BUDGET_BYTES)
    cards = [
        _Card(item, tuple(map(thumbnails.of, conversation.images[: len(item.sizes)])))
        for conversation, item in shown
    ]
    try:
        write_file(output, _render(cards, title))
    except OSError as error:
        raise VlmtuneError(
            f"the page cannot be written ({error.strerror or error})",
            file=output,
            do="give another file with --html",
        ) from error


def _render(cards: Sequence[_Card], title: str) -> str:
    templates = files("vlmtune.report") / "templates"
    style = (templates / "page.css").read_text("utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (templates / name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        lstrip_blocks=True,
    )
    environment.filters |= {"plural": plural, "escaped": escaped}
    digest = base64.b64encode(sha256(style.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template("preview.html").render(
        cards=cards,
        title=title,
        style=Markup(style),
        style_hash=f"sha256-{digest}",
        version=__version__,
        made_at=time.strftime("%Y-%m-%d %H:%M"),
    )


def _weights(sample: Sample) -> list[str]:
    """How many supervised tokens have a loss weight other than 1."""
    if sample.weights is None:
        return []
    weights = Counter(sample.weights[sample.targets != IGNORED].tolist())
    return [
        f"{plural(count, 'supervised token')} with weight {weight:g}"
        for weight, count in sorted(weights.items())
        if weight != 1
    ]


def _media_ids(encoder: Encoder) -> dict[int, str]:
    """The ids that stand for parts of media, by kind."""
    processor = encoder.processor
    tokens = {processor.image_token: "picture"}
    video_token = getattr(processor, "video_token", None)
    if video_token is not None:
        tokens.setdefault(video_token, "video")
    return {
        int(processor.tokenizer.convert_tokens_to_ids(token)): kind
        for token, kind in tokens.items()
    }
