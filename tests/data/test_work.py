"""What a sample's work is taken for, and how it spreads a step over processes."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from tests.data.processors import build_processor
from vlmtune.data.batches import balanced_shares
from vlmtune.data.encode import Encoder
from vlmtune.data.measure import TOKENS_PER_PICTURE, WorkScale
from vlmtune.data.types import Conversation, Image, Part, Source, Text, Turn, Video


def asked(*parts: Part, answer: str = "yes") -> Conversation:
    turns = (Turn("user", parts), Turn("assistant", (Text(answer),)))
    return Conversation("a", turns, Source("data", 1))


def picture(folder: Path, width: int, height: int) -> Image:
    path = folder / f"{width}x{height}.png"
    PIL.Image.effect_noise((width, height), 60).convert("RGB").save(path)
    return Image(path.name, folder)


def test_pictures_count_by_their_area_within_the_budget(tmp_path: Path):
    scale = WorkScale(pixels_per_token=16 * 16, least=32 * 32, most=64 * 64, max_pixels=10**6)
    tokens = [
        scale.tokens(asked(picture(tmp_path, *size), answer="four" * 10))
        for size in ((48, 32), (200, 200), (8, 8))
    ]
    assert tokens == [10 + 6, 10 + 16, 10 + 4]
    assert scale.tokens(asked(Text("none"))) == pytest.approx(7 / 4)


def test_what_cannot_be_opened_is_no_error_here(tmp_path: Path):
    scale = WorkScale(pixels_per_token=256, least=1, most=10**6, max_pixels=100)
    gone, large = Image("gone.png", tmp_path), picture(tmp_path, 20, 20)
    assert scale.tokens(asked(gone, answer="")) == scale.tokens(asked(large, answer="")) == 0
    by_url = Image("https://example.org/a.png", tmp_path)
    assert scale.tokens(asked(by_url, answer="")) == TOKENS_PER_PICTURE
    assert scale.tokens(asked(Video("a.mp4", tmp_path), answer="")) == 8 * TOKENS_PER_PICTURE


def test_the_estimate_follows_the_encoded_length(tmp_path: Path):
    """Roughly, for pictures of a processor that sizes them by area."""
    processor = build_processor("qwen")
    scale = WorkScale.of(processor, pixel_budget=True, max_pixels=10**6)
    encoder = Encoder(processor, max_tokens=4096, over_length="error", max_image_pixels=10**6)
    empty = encoder.encode(asked(Text(""))).num_tokens
    for size in ((64, 64), (40, 60), (500, 300)):
        given = asked(picture(tmp_path, *size), answer="")
        encoded = encoder.encode(asked(picture(tmp_path, *size))).num_tokens - empty
        assert scale.tokens(given) == pytest.approx(encoded, rel=0.35, abs=3)
    assert WorkScale.of(processor, pixel_budget=False, max_pixels=1).pixels_per_token is None


def test_two_processes_get_the_same_work_where_turns_would_not(tmp_path: Path):
    scale = WorkScale(pixels_per_token=256, least=1, most=10**6, max_pixels=10**6)
    large, small = picture(tmp_path, 160, 160), picture(tmp_path, 16, 16)
    step = [asked(large if at % 2 == 0 else small, answer="") for at in range(8)]
    work = [scale.tokens(sample) for sample in step]
    even = [sum(work[at] for at in share) for share in balanced_shares(work, 2)]
    assert even[0] == even[1]
    by_turns = [sum(work[rank::2]) for rank in (0, 1)]
    assert by_turns[0] > 50 * by_turns[1]
