from __future__ import annotations

from pathlib import Path

import pytest

from vlmtune.data.encode import Encoder
from vlmtune.data.types import Conversation, Image, Source, Text, Turn
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.dialogue import AS_TYPED, Dialogue
from vlmtune.evaluation.generate import generate_answers
from vlmtune.models.load import VLM

QUESTION = "What color is it?"


@pytest.fixture
def dialogue(vlm: VLM, encoder: Encoder) -> Dialogue:
    return Dialogue(vlm, encoder=encoder, max_new_tokens=6, max_image_pixels=10**6)


@pytest.fixture
def picture(sample_data: Path) -> Path:
    return sample_data / "images" / "eval-000.png"


def greedy(vlm: VLM, encoder: Encoder, *turns: Turn) -> str:
    conversation = Conversation("0", turns, Source("test", 1))
    return generate_answers(vlm, [conversation], encoder=encoder, max_new_tokens=6, batch_size=1)[0]


def test_the_stream_is_the_greedy_answer(
    dialogue: Dialogue, vlm: VLM, encoder: Encoder, picture: Path
) -> None:
    pieces: list[str] = []
    dialogue.add_image(picture)
    answer = dialogue.ask(QUESTION, on_text=pieces.append)
    shown = (Image(str(picture), picture.parent, media_policy=AS_TYPED), Text(QUESTION))
    assert answer.text == greedy(vlm, encoder, Turn("user", shown))
    assert answer.text == "".join(pieces).strip() != ""
    assert answer.is_complete


def test_a_link_to_a_picture_may_lead_anywhere(
    dialogue: Dialogue, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "link.png").symlink_to(picture)
    dialogue.add_image(tmp_path / "link.png")
    assert len(dialogue.images) == 1


def test_the_next_question_sees_what_was_said(
    dialogue: Dialogue, vlm: VLM, encoder: Encoder, picture: Path
) -> None:
    dialogue.add_image(picture)
    first = dialogue.ask(QUESTION, on_text=lambda _: None)
    second = dialogue.ask("And the shape?", on_text=lambda _: None)
    turns = (
        Turn("user", (Image(str(picture), picture.parent, media_policy=AS_TYPED), Text(QUESTION))),
        Turn("assistant", (Text(first.text),)),
        Turn("user", (Text("And the shape?"),)),
    )
    assert second.text == greedy(vlm, encoder, *turns)
    assert dialogue.turns == [*turns, Turn("assistant", (Text(second.text),))]
    dialogue.reset()
    assert dialogue.turns == []


def test_ctrl_c_ends_an_answer_and_keeps_the_conversation(dialogue: Dialogue) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    answer = dialogue.ask("Name a color.", on_text=interrupt)
    assert not answer.is_complete
    assert [turn.role for turn in dialogue.turns] == ["user", "assistant"]
    assert dialogue.ask("Name a shape.", on_text=lambda _: None).is_complete


def test_a_question_that_cannot_be_asked_leaves_everything_as_it_was(
    vlm: VLM, picture: Path
) -> None:
    short = Encoder(vlm.processor, max_tokens=30, over_length="error", max_image_pixels=10**6)
    dialogue = Dialogue(vlm, encoder=short, max_new_tokens=2, max_image_pixels=10**6)
    dialogue.add_image(picture)
    with pytest.raises(VlmtuneError, match="too long"):
        dialogue.ask("What is it? " * 20, on_text=lambda _: None)
    assert dialogue.turns == []
    assert len(dialogue.images) == 1


def test_a_picture_that_cannot_be_opened_is_refused_at_once(
    dialogue: Dialogue, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name in ("broken.png", "missing.png"):
        with pytest.raises(VlmtuneError):
            dialogue.add_image(tmp_path / name)
    assert dialogue.images == []
