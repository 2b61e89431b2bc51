"""The embedded default, loaded once, and rows of pictures with captions for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlmtune.data.dataset import load_conversations
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation
from vlmtune.models.load import VLM, load_vlm


@pytest.fixture(scope="module")
def vlm(tiny_vlm: Path) -> VLM:
    return load_vlm(str(tiny_vlm), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def encoder(vlm: VLM) -> Encoder:
    return Encoder(vlm.processor, max_tokens=512, over_length="error", max_image_pixels=10**6)


@pytest.fixture(scope="session")
def conversations(sample_data: Path) -> list[Conversation]:
    """Six pictures with two captions each."""
    return load_conversations([sample_data / "captions_eval.jsonl"])[0][:12]
