"""The embedded default, loaded once, and questions of different lengths for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Image, Source, Text, Turn
from vlmtune.models.load import VLM, load_vlm


@pytest.fixture(scope="module")
def vlm(tiny_vlm: Path) -> VLM:
    return load_vlm(str(tiny_vlm), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def encoder(vlm: VLM) -> Encoder:
    return Encoder(vlm.processor, max_tokens=512, over_length="error", max_image_pixels=10**6)


@pytest.fixture(scope="session")
def conversations(sample_data: Path) -> list[Conversation]:
    """With one picture, with two, with none, with a turn before; prompts of 20 to 90 tokens."""
    pictures = [Image(f"images/eval-00{number}.png", sample_data) for number in range(5)]
    questions = [
        (pictures[:1], "What color is it?"),
        (pictures[1:2], "Is there a circle in this picture, or is it something else entirely?"),
        ([], "Name a color."),
        (pictures[2:4], "Do these two pictures show the same shape?"),
        (pictures[4:], "What?"),
        ([], "Which of the words red, green, blue, circle and triangle are names of colors?"),
    ]
    made = []
    for number, (images, text) in enumerate(questions):
        turns = (Turn("user", (*images, Text(text))), Turn("assistant", (Text("red"),)))
        if number == 4:
            turns = (
                Turn("user", (Text("Hello."),)),
                Turn("assistant", (Text("Hello."),)),
                *turns,
            )
        made.append(Conversation(str(number), turns, Source("questions.jsonl", number + 1)))
    return made
