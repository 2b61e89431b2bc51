"""Fixtures of the data layer: small processors and pictures."""

from __future__ import annotations

from functools import cache

import PIL.Image
import pytest

from tests.data.processors import KINDS, build_processor
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Image, Source, Text, Turn


@cache
def cached_processor(kind: str):
    return build_processor(kind)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def make_encoder():
    def make(
        kind: str, *, max_tokens: int = 2048, over_length: str = "error", **options
    ) -> Encoder:
        return Encoder(
            cached_processor(kind),
            max_tokens=max_tokens,
            over_length=over_length,
            max_image_pixels=10_000_000,
            **options,
        )

    return make


@pytest.fixture
def picture(tmp_path) -> Image:
    PIL.Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    return Image("red.png", tmp_path)


@pytest.fixture
def make_conversation():
    """`make_conversation(("user", "Hi", picture), ("assistant", "Yo"))`."""

    def make(*turns) -> Conversation:
        built = tuple(
            Turn(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))
            for role, *parts in turns
        )
        return Conversation("one", built, Source("train.jsonl", 7))

    return make
