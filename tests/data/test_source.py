"""Rows of turns as conversations: what is read, in which order, from which kinds of file."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import get_args

import PIL.Image
import pytest

from vlmtune.data.dataset import content_hash, load_conversations, open_conversations
from vlmtune.data.formats.registry import FORMATS
from vlmtune.data.types import Image, Text, Turn, Video
from vlmtune.errors import ErrorGroup
from vlmtune.recipe.data_section import FormatName

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Yo"}
GOOD = {"messages": [USER, ASSISTANT]}


@pytest.fixture
def load(tmp_path):
    """`load(row, …)`: the conversations of a JSONL file with these rows."""
    for name in ("a.png", "b c.png", "ü.png"):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / name)

    def load_rows(*rows):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return load_conversations([path])[0]

    return load_rows


def test_every_format_that_a_recipe_may_name_is_there():
    assert set(FORMATS) == set(get_args(FormatName))


def test_messages_with_parts_several_turns_and_pictures(load, tmp_path):
    (conversation,) = load(
        {
            "id": "x",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "b c.png"},
                        {"type": "text", "text": "Same as "},
                        {"type": "image", "image": "ü.png"},
                        {"type": "text", "text": "this"},
                        {"type": "text", "text": "?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "yes"},
            ],
            "answers": ["no", "nope"],
            "question_type": "same",
        }
    )
    first, second = Image("b c.png", tmp_path), Image("ü.png", tmp_path)
    assert conversation.turns == (
        Turn("system", (Text("Be brief."),)),
        Turn("user", (first, Text("Same as "), second, Text("this?"))),
        Turn("assistant", (Text("no"),)),
        Turn("user", (Text("Sure?"),)),
        Turn("assistant", (Text("yes"),)),
    )
    assert conversation.images == (first, second)
    assert (conversation.id, conversation.answers) == ("x", ("no", "nope"))
    assert (conversation.question_type, conversation.source.line) == ("same", 1)


def test_conversations_is_another_word_for_messages(load):
    one, two = load({"messages": [USER, ASSISTANT]}, {"conversations": [USER, ASSISTANT]})
    assert one.turns == two.turns


def test_sharegpt_placeholders_take_the_pictures_in_order(load, tmp_path):
    (conversation,) = load(
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "<image>\nCompare with <image> please"},
                {"from": "gpt", "value": "Different."},
            ],
            "images": ["a.png", "b c.png"],
        }
    )
    assert conversation.turns[1].parts == (
        Image("a.png", tmp_path),
        Text("Compare with "),
        Image("b c.png", tmp_path),
        Text(" please"),
    )
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant"]


def test_llavas_single_image_key_and_a_placeholder_at_the_end(load, tmp_path):
    (conversation,) = load(
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "What is it?\n<image>"},
                {"from": "gpt", "value": "A cat."},
            ],
        }
    )
    assert conversation.turns[0].parts == (Text("What is it?"), Image("a.png", tmp_path))


def test_listed_images_fill_image_parts_and_placeholders_of_messages(load, tmp_path):
    part, word = load(
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]},
                ASSISTANT,
            ],
            "images": ["a.png"],
        },
        {
            "messages": [{"role": "user", "content": "<image>Hi"}, ASSISTANT],
            "images": ["a.png"],
        },
    )
    assert part.turns == word.turns
    assert part.turns[0].parts == (Image("a.png", tmp_path), Text("Hi"))


def test_without_listed_images_the_word_image_stays_text(load):
    (conversation,) = load({"messages": [{"role": "user", "content": "an <image> tag"}, ASSISTANT]})
    assert conversation.turns[0].text == "an <image> tag"


def test_text_is_kept_to_the_character(load):
    text = "  e\u0301 😀\t\r\n\u2028 \u00a0"
    (conversation,) = load(
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    )
    assert [turn.text for turn in conversation.turns] == [text, text]


def test_ids_default_to_the_files_stem_and_line(load):
    assert [c.id for c in load(GOOD, GOOD, {**GOOD, "id": 3})] == ["data:1", "data:2", "3"]


def test_two_files_of_one_name_have_ids_of_their_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps(GOOD))
    paths = [tmp_path / name / "train.jsonl" for name in ("a", "b")]
    conversations, _ = load_conversations(paths)
    assert len({conversation.id for conversation in conversations}) == 2


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data"])
def test_an_array_is_known_by_its_bracket_and_lines_by_their_brace(name, tmp_path):
    path = tmp_path / name
    path.write_text("\n " + json.dumps([GOOD, GOOD], indent=1))
    assert [c.source.line for c in load_conversations([path])[0]] == [1, 2]
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD))
    assert [c.source.line for c in load_conversations([path])[0]] == [1, 3]


def test_a_byte_order_mark_crlf_and_blank_lines_do_not_matter(tmp_path):
    path = tmp_path / "data.jsonl"
    row = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n   \r\n" + row)
    assert [c.source.line for c in load_conversations([path])[0]] == [1, 4]
    path.write_bytes(b"\xef\xbb\xbf[" + row + b"]")
    assert len(load_conversations([path])[0]) == 1


def test_keys_that_are_not_used_are_counted_in_one_line(load, caplog):
    with caplog.at_level(logging.INFO, logger="vlmtune"):
        load({**GOOD, "author": "me"}, {**GOOD, "author": "you", "split": 1}, GOOD)
    detected, record = caplog.records
    assert "3 rows, format messages (detected)" in detected.getMessage()
    assert "author (2), split (1)" in record.getMessage()


def test_media_checks_can_be_left_to_later(tmp_path):
    path = tmp_path / "data.jsonl"
    part = {"type": "image", "image": "missing.png"}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [part]}, ASSISTANT]}))
    conversations, skipped = load_conversations([path], check_media=False)
    assert len(conversations) == 1 and not skipped


def test_content_hash_is_the_files_sha256(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"abc")
    assert content_hash([path]) == {str(path): hashlib.sha256(b"abc").hexdigest()}
    path.write_bytes(b"abd")
    assert content_hash([path]) != {str(path): hashlib.sha256(b"abc").hexdigest()}


def test_a_turns_weight_is_its_weight_or_zero_with_train_false(load):
    answers = [
        {**ASSISTANT, "train": False},
        {**ASSISTANT, "weight": 0.5},
        {**ASSISTANT, "train": True},
        {**ASSISTANT, "train": None, "weight": None},
    ]
    turns = [turn for answer in answers for turn in (USER, answer)]
    (conversation,) = load({"messages": turns})
    assert [t.weight for t in conversation.turns if t.role == "assistant"] == [0.0, 0.5, 1.0, 1.0]


def test_sharegpts_turns_have_weights_too(load):
    human, gpt = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}
    (conversation,) = load({"conversations": [human, {**gpt, "weight": 3}, human, gpt]})
    assert [turn.weight for turn in conversation.turns] == [1.0, 3.0, 1.0, 1.0]


def test_keys_of_turns_that_are_not_used_are_counted_with_those_of_rows(load, caplog):
    with caplog.at_level(logging.INFO, logger="vlmtune"):
        load({"messages": [{**USER, "name": "me"}, {**ASSISTANT, "wieght": 2}]})
    assert "messages[].name (1), messages[].wieght (1)" in caplog.records[1].getMessage()


def test_videos_are_files_or_lists_of_frames_in_parts_or_beside_the_turns(load, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"clip")
    frames = ["a.png", "b c.png"]

    def asked(*parts, **keys):
        return {"messages": [{"role": "user", "content": list(parts)}, ASSISTANT], **keys}

    text = {"type": "text", "text": "Hi"}
    file, listed = Video("a.mp4", tmp_path), Video(tuple(frames), tmp_path)
    rows = {
        file: [
            asked({"type": "video", "video": "a.mp4"}, text),
            asked({"type": "video"}, text, videos=["a.mp4"]),
            asked({"type": "text", "text": "<video>\nHi"}, video="a.mp4"),
        ],
        listed: [
            asked({"type": "video", "video": frames, "image": None}, text),
            asked({"type": "video"}, text, videos=[frames]),
            asked({"type": "text", "text": "<video>Hi"}, video=frames),
        ],
    }
    for video, same in rows.items():
        assert [c.turns[0].parts for c in load(*same)] == [(video, Text("Hi"))] * 3


def test_pictures_and_videos_are_taken_by_placeholders_of_their_own(load, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"clip")
    turns = [{"from": "human", "value": "<video><image>?"}, {"from": "gpt", "value": "Yo"}]
    (conversation,) = load({"conversations": turns, "image": "a.png", "video": "a.mp4"})
    assert conversation.turns[0].parts == (
        Video("a.mp4", tmp_path),
        Image("a.png", tmp_path),
        Text("?"),
    )


def test_llavas_video_rows_write_image_for_the_video(load, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"clip")
    turns = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yo"}]
    (conversation,) = load({"conversations": turns, "video": "a.mp4"})
    assert conversation.turns[0].parts == (Video("a.mp4", tmp_path), Text("Hi"))


def test_video_is_a_word_of_html_where_none_is_listed(load):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Use <video src>, <video>"}]
    asked, answered = load(
        {"messages": [{"role": "user", "content": "a <video> tag"}, ASSISTANT]},
    ) + load({"conversations": turns})
    assert asked.turns[0].text == "a <video> tag"
    assert answered.turns[1].text == "Use <video src>, <video>"


def test_training_takes_rows_with_one_id_and_evaluation_does_not(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({**GOOD, "id": name}) for name in "aba"))
    conversations, skipped = open_conversations([path], on_bad_sample="error")
    assert [c.id for c in conversations] == ["a", "b", "a"] and not skipped
    with pytest.raises(ErrorGroup, match="data.jsonl:3: the id 'a' is used twice"):
        load_conversations([path])
