"""Samples as the model sees them: pieces, sizes, and the page."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import PIL.Image
import pytest

from tests.data.processors import build_processor
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Image, Source, Text, Turn
from vlmtune.errors import VlmtuneError
from vlmtune.report.pictures import PictureSize
from vlmtune.report.preview import preview, write_preview_page

MARKUP = "<script>alert(1)</script>"


@cache
def processor_of(kind: str):
    return build_processor(kind)


def encoder_of(kind: str, *, max_tokens: int = 2048, over_length: str = "error") -> Encoder:
    return Encoder(
        processor_of(kind),
        max_tokens=max_tokens,
        over_length=over_length,  # type: ignore[arg-type]
        max_image_pixels=10_000_000,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PIL.Image.new("RGB", (100, 60), "red").save(tmp_path / "red.png")
    PIL.Image.new("RGB", (20, 40), "blue").save(tmp_path / "blue.png")
    return tmp_path


def ask(folder: Path, *pictures: str, question: str = "What?", answer: str = "red") -> Conversation:
    parts = (*(Image(name, folder) for name in pictures), Text(question))
    turns = (Turn("user", parts), Turn("assistant", (Text(answer),)))
    return Conversation("one", turns, Source("data.jsonl", 3))


def test_the_template_is_shown_with_picture_spans_counted(folder: Path):
    shown = preview(ask(folder, "red.png"), encoder_of("qwen"))
    text = "".join(piece.text for piece in shown.pieces)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|><|image_pad|> x {shown.num_media}<|vision_end|>"
        "What?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
    assert [piece.text for piece in shown.pieces if piece.kind == "taught"] == ["red<|im_end|>"]
    assert (shown.id, shown.file, shown.line) == ("one", "data.jsonl", 3)


def test_counts_are_those_of_the_sample(folder: Path):
    encoder = encoder_of("qwen")
    conversation = ask(folder, "red.png", "blue.png")
    shown, sample = preview(conversation, encoder), encoder.encode(conversation)
    assert (shown.num_tokens, shown.num_supervised) == (sample.num_tokens, sample.num_supervised)
    pads = int((sample.input_ids == processor_of("qwen").image_token_id).sum())
    assert shown.num_media == pads == sum(size.num_tokens or 0 for size in shown.sizes)


def test_sizes_follow_the_grid_of_patches(folder: Path):
    """At most 64 x 64 pixels of area, both sides in multiples of 16: 100 x 60 keeps its shape as
    80 x 48 = 3,840; 16 x 16 pixels are a token."""
    shown = preview(ask(folder, "red.png", "blue.png"), encoder_of("qwen"))
    assert shown.sizes == (
        PictureSize(100, 60, "80 x 48", 15),
        PictureSize(20, 40, "16 x 32", 2),
    )
    assert shown.sizes[0].text == "100 x 60 -> 80 x 48, 15 tokens"


def test_sizes_where_a_processor_crops_or_tiles(folder: Path):
    """LLaVA's: 32 x 32 in patches of 8. Idefics3's: tiles of 32 x 32, 4 tokens each."""
    [cropped] = preview(ask(folder, "red.png"), encoder_of("llava")).sizes
    assert cropped == PictureSize(100, 60, "32 x 32", 16)
    [tiled] = preview(ask(folder, "red.png"), encoder_of("idefics")).sizes
    # 100 x 60 becomes 64 x 38 or so: two columns of tiles, two rows, and the whole.
    assert tiled == PictureSize(100, 60, "5 tiles of 32 x 32", 20)


def test_sizes_are_upright(folder: Path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    PIL.Image.new("RGB", (100, 60)).save(folder / "turned.jpg", exif=exif)
    [size] = preview(ask(folder, "turned.jpg"), encoder_of("qwen")).sizes
    assert (size.width, size.height, size.processed) == (60, 100, "48 x 80")


def test_shrunk_pictures_are_shown_as_they_are_seen(folder: Path):
    whole = preview(ask(folder, "red.png"), encoder_of("qwen"))
    room = whole.num_tokens - 6
    shown = preview(
        ask(folder, "red.png"), encoder_of("qwen", max_tokens=room, over_length="shrink_images")
    )
    [size] = shown.sizes
    assert shown.num_tokens <= room
    assert (size.width, size.height) == (100, 60) and size.processed != "80 x 48"
    assert size.num_tokens == shown.num_media
    assert any("shrunk" in note for note in shown.notes)
    # Where a processor has no grid, the size of a shrunk picture is not guessed.
    whole = preview(ask(folder, "red.png"), encoder_of("idefics"))
    shrunk = encoder_of("idefics", max_tokens=whole.num_tokens - 10, over_length="shrink_images")
    [size] = preview(ask(folder, "red.png"), shrunk).sizes
    assert size == PictureSize(100, 60, None, None)


def test_weights_are_told(folder: Path):
    answers = [Turn("assistant", (Text("red"),), weight) for weight in (0.5, 1.0)]
    user = Turn("user", (Text("What?"),))
    conversation = Conversation("w", (user, answers[0], user, answers[1]), Source("a.jsonl", 1))
    plain = preview(Conversation("w", (user, answers[1]), Source("a.jsonl", 1)), encoder_of("qwen"))
    assert plain.notes == ()
    shown = preview(conversation, encoder_of("qwen"))
    assert shown.num_supervised == 2 * plain.num_supervised
    assert shown.notes == (f"{plain.num_supervised} supervised tokens with weight 0.5",)


def test_text_that_turns_text_around_is_escaped_on_the_page(folder: Path):
    conversation = ask(folder, question="a\u202eb é")
    output = folder / "page.html"
    shown = preview(conversation, encoder_of("qwen"))
    write_preview_page([(conversation, shown)], output, title="t\u2066")
    page = output.read_text("utf-8")
    assert "\u202e" not in page and "\u2066" not in page
    assert "a\\u202eb é" in page and "t\\u2066" in page


def test_a_sample_without_pictures(folder: Path):
    shown = preview(ask(folder), encoder_of("qwen"))
    assert (shown.sizes, shown.num_media) == ((), 0)


def test_the_page_escapes_everything_and_holds_the_pictures(folder: Path):
    conversation = ask(folder, "red.png", question=MARKUP, answer="a & b " + MARKUP)
    shown = preview(conversation, encoder_of("qwen"))
    output = folder / "deep" / "page.html"
    write_preview_page([(conversation, shown)], output, title=MARKUP)
    page = output.read_text("utf-8")
    assert MARKUP not in page and "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert len(re.findall(r'<img src="data:image/webp;base64,', page)) == 1
    assert "100 x 60 -&gt; 80 x 48, 15 tokens" in page
    taught = re.findall(r"<mark>(.*?)</mark>", page, re.DOTALL)
    assert taught[1:] == ["a &amp; b &lt;script&gt;alert(1)&lt;/script&gt;&lt;|im_end|&gt;"]
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not list(output.parent.glob(".writing*"))


def test_a_page_that_cannot_be_written_is_named(folder: Path):
    (folder / "file").write_text("")
    with pytest.raises(VlmtuneError, match="cannot be written"):
        write_preview_page([], folder / "file" / "page.html", title="x")
