"""OpenAI chat: the same conversation as `messages`, by other names."""

from __future__ import annotations

import pytest

from tests.data.formats.examples import ASSISTANT, USER, read, said
from vlmtune.errors import SampleError


def _ask(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, ASSISTANT]}


def test_a_row_is_what_messages_would_say():
    text = {"type": "text", "text": "What is it?"}
    theirs = read("openai", _ask(text, {"type": "image_url", "image_url": {"url": "a.png"}}))
    ours = read("messages", _ask(text, {"type": "image", "image": "a.png"}))
    assert theirs == ours
    assert theirs != read("messages", _ask(text, {"type": "image", "image": "b.png"}))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}, "text": None},
        {"type": "input_image", "image_url": "a.png", "detail": "auto"},
    ],
)
def test_the_ways_to_write_a_picture_are_the_same(part):
    assert said(read("openai", _ask(part)))[0] == ("user", "[a.png]")


def test_texts_of_the_responses_api_developer_and_weight_are_understood():
    conversation = read(
        "openai",
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
                USER,
                {**ASSISTANT, "weight": 0},
            ]
        },
    )
    assert said(conversation)[:3] == [("system", "Be brief."), ("user", "Hi"), ("assistant", "A")]
    assert [turn.weight for turn in conversation.turns] == [1, 1, 1, 1, 0]


def test_a_video_url_is_a_video():
    conversation = read("openai", _ask({"type": "video_url", "video_url": {"url": "a.mp4"}}))
    assert [video.ref for video in conversation.videos] == ["a.mp4"]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_uri", "image_url": "a.png"}, "unknown type.*did you mean 'image_url'"),
        ({"type": ["image_url"]}, "unknown type; got: a list"),
        ({"image_url": "a.png"}, "part 1 has no type; got: image_url"),
        ({"type": "image_url"}, "reference cannot be used"),
        ({"type": "image_url", "image_url": {"url": 3}}, "reference cannot be used"),
        ({"type": "image_url", "image_url": {"uri": "a.png"}}, "unknown key in image_url"),
        ({"type": "input_image", "file_id": "f"}, "unknown key; got: file_id"),
        ({"type": "input_text", "txt": "f"}, "unknown key; got: txt"),
        ({"type": "text", "text": 3}, "part 1 is not a text"),
        (3, "part 1 is not an object"),
    ],
)
def test_a_malformed_part_is_named(part, reason):
    with pytest.raises(SampleError, match=rf"rows\.jsonl:7: .*{reason}"):
        read("openai", _ask(part))


def test_tools_are_refused():
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    for turn, reason in ((calls, "turn 2 calls tools"), ({**USER, "role": "tool"}, "unknown role")):
        with pytest.raises(SampleError, match=reason):
            read("openai", {"messages": [USER, turn]})
