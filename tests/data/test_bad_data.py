"""A table of data that cannot be used: each names its file and line, and says what is wrong."""

from __future__ import annotations

import base64
import json

import PIL.Image
import pytest

from tests.data.conftest import cached_processor
from vlmtune.data.dataset import load_conversations, open_conversations
from vlmtune.data.encode import Encoder
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Yo"}
GOOD = {"messages": [USER, ASSISTANT]}


def _messages(*turns, **keys) -> dict:
    return {"messages": list(turns), **keys}


def _asked(*parts, **keys) -> dict:
    return _messages({"role": "user", "content": list(parts)}, ASSISTANT, **keys)


def _image(ref) -> dict:
    return {"type": "image", "image": ref}


def _sharegpt(*values, **keys) -> dict:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns, **keys}


# The second line of a file, as a value or as raw bytes -> what the message says.
BAD_ROWS = {
    "not JSON": (b"{'messages': []}", "not JSON"),
    "cut off": (b'{"messages": [{"role": "user", "con', "not JSON"),
    "two objects": (b'{"messages": []} {"messages": []}', "not JSON"),
    "NaN": (b'{"messages": NaN}', "NaN is not a JSON value"),
    "key twice": (b'{"id": "a", "id": "b"}', "'id' is given twice"),
    "nested too deeply": (b'{"messages":' + b"[" * 200_000, "nested too deeply"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "not UTF-8"),
    "a number": (3, "not an object"),
    "null": (None, "not an object"),
    "no messages": ({"text": "Hi"}, "no messages"),
    "misspelt messages": ({"mesages": [USER, ASSISTANT]}, "'mesages' misspelt"),
    "both": ({"messages": [USER], "conversations": [USER]}, "both messages and conversations"),
    "messages a text": ({"messages": "Hi"}, "messages is not a list"),
    "empty messages": ({"messages": []}, "messages is empty"),
    "turn a text": ({"messages": ["Hi", "Yo"]}, "turn 1 is not an object"),
    "unknown form": ({"messages": [{"speaker": "a", "says": "b"}]}, "turn 1 has no role"),
    "mixed forms": (_messages(USER, {"from": "gpt", "value": "Yo"}), "turn 2 has no role"),
    "no role": (_messages({"content": "Hi"}, ASSISTANT), "turn 1 has no role"),
    "no content": (_messages({"role": "user"}, ASSISTANT), "turn 1 has no content"),
    "unknown role": (_messages({"role": "usr", "content": "Hi"}), "did you mean 'user'"),
    "role a number": (_messages({"role": 1, "content": "Hi"}), "unknown role"),
    "assistant first": (_messages(ASSISTANT, USER), "turn 1 has the wrong role"),
    "two users": (_messages(USER, USER, ASSISTANT), "turn 2 has the wrong role"),
    "two assistants": (_messages(USER, ASSISTANT, ASSISTANT), "turn 3 has the wrong role"),
    "system later": (
        _messages(USER, ASSISTANT, {"role": "system", "content": "S"}),
        "turn 3 has the wrong role",
    ),
    "no assistant": (_messages(USER), "no assistant turn"),
    "not answered": (_messages(USER, ASSISTANT, USER), "last turn is not answered"),
    "empty answer": (_messages(USER, {"role": "assistant", "content": " \n"}), "is empty"),
    "empty question": (_messages({"role": "user", "content": []}, ASSISTANT), "is empty"),
    "content null": (_messages({"role": "user", "content": None}, ASSISTANT), "not a text"),
    "content a number": (_messages(USER, {"role": "assistant", "content": 7}), "not a text"),
    "half an emoji": (_messages({"role": "user", "content": "\ud83d"}, ASSISTANT), "surrogate"),
    "part a text": (_asked("Hi"), "turn 1, part 1 is not an object"),
    "part without type": (_asked({"text": "Hi"}), "part 1 has no type"),
    "unknown part": (_asked({"type": "audio", "audio": "a.wav"}), "unknown type"),
    "missing video": (_asked({"type": "video", "video": "a.mp4"}), "no such .*a.mp4"),
    "missing frame": (_asked({"type": "video", "video": ["ok.png", "b.png"]}), "no such .*b.png"),
    "video without frames": (_asked({"type": "video", "video": []}), "no frames"),
    "video null": (_asked({"type": "video"}), "video's reference cannot be used"),
    "frames as objects": (_asked({"type": "video", "video": [{}]}), "reference cannot be used"),
    "unknown part key": (_asked({"type": "text", "text": "a", "txt": "b"}), "unknown key.*txt"),
    "image without a picture": (_asked({"type": "image"}), "reference cannot be used"),
    "image null": (_asked(_image(None)), "reference cannot be used"),
    "missing file": (_asked(_image("missing.png")), "no such picture file.*missing.png"),
    "a folder": (_asked(_image("folder")), "is a folder"),
    "zero bytes": (_asked(_image("empty.png")), "is empty"),
    "from the network": (_asked(_image("https://example.org/a.png")), "download"),
    "file URL": (_asked(_image("file:///a.png")), "plain path"),
    "data URL of text": (_asked(_image("data:text/plain,Hi")), "not a data: URL"),
    "picture in an answer": (
        _messages(USER, {"role": "assistant", "content": [_image("ok.png")]}),
        "turn 2 \\(assistant\\) contains a picture",
    ),
    "picture in a system turn": (
        _messages({"role": "system", "content": [_image("ok.png")]}, USER, ASSISTANT),
        "turn 1 \\(system\\) contains a picture",
    ),
    "picture without a placeholder": (
        _messages(USER, ASSISTANT, images=["ok.png"]),
        "1 in image\\(s\\), 0 placeholders",
    ),
    "image and images": (_messages(USER, ASSISTANT, image="a", images=["b"]), "both image and"),
    "images a number": (_messages(USER, ASSISTANT, images=3), "reference cannot be used"),
    "id a list": (_messages(USER, ASSISTANT, id=[1]), "id cannot be used"),
    "id taken": (_messages(USER, ASSISTANT, id="first"), "'first' is used twice.*data.jsonl:1"),
    "answers a text": (_messages(USER, ASSISTANT, answers="yes"), "answers cannot be used"),
    "answers of numbers": (_messages(USER, ASSISTANT, answers=[1]), "answers cannot be used"),
    "options a text": (_messages(USER, ASSISTANT, options="a"), "options cannot be used"),
    "no answers": (_messages(USER, answers=[]), "no assistant turn"),
    "half a character in answers": (_messages(USER, answers=["\ud83d"]), "surrogate"),
    "half a character in an id": (_messages(USER, ASSISTANT, id="\ud83d"), "surrogate"),
    "half a character in a path": (_asked(_image("\ud83d.png")), "surrogate"),
    "question_type": (_messages(USER, ASSISTANT, question_type=1), "question_type is not a text"),
    "train a text": (_messages(USER, {**ASSISTANT, "train": "no"}), "train of turn 2 cannot"),
    "weight a text": (_messages(USER, {**ASSISTANT, "weight": "2"}), "weight of turn 2 cannot"),
    "weight true": (_messages(USER, {**ASSISTANT, "weight": True}), "weight of turn 2 cannot"),
    "weight below zero": (_messages(USER, {**ASSISTANT, "weight": -1}), "weight of turn 2 cannot"),
    "huge weight": (_messages(USER, {**ASSISTANT, "weight": 10**400}), "weight of turn 2 cannot"),
    "tiny weight": (_messages(USER, {**ASSISTANT, "weight": 1e-300}), "weight of turn 2 cannot"),
    "train and weight": (
        _messages(USER, {**ASSISTANT, "train": True, "weight": 1}),
        "turn 2 has both train and weight",
    ),
    "train of a question": (
        _messages({**USER, "train": True}, ASSISTANT),
        "turn 1 \\(user\\) has a train key",
    ),
    "weight of a question": (
        _messages({**USER, "weight": 0}, ASSISTANT),
        "turn 1 \\(user\\) has a weight key",
    ),
    "video without a placeholder": (
        _messages(USER, ASSISTANT, videos=["ok.png"]),
        "videos and video placeholders.*1 in video\\(s\\), 0 placeholders",
    ),
    "video and videos": (_messages(USER, ASSISTANT, video="a", videos=["b"]), "both video and"),
    "video in an answer": (
        _messages(USER, {"role": "assistant", "content": [{"type": "video", "video": "ok.png"}]}),
        "turn 2 \\(assistant\\) contains a video",
    ),
    "sharegpt: one picture too few": (
        _sharegpt("<image><image> Hi", "Yo", images=["ok.png"]),
        "1 in image\\(s\\), 2 placeholders",
    ),
    "sharegpt: no picture": (_sharegpt("<image> Hi", "Yo"), "0 in image\\(s\\), 1 placeholders"),
    "sharegpt: one too many": (_sharegpt("Hi", "Yo", image="ok.png"), "1 in image"),
    "sharegpt: speaker": (
        {"conversations": [{"from": "humam", "value": "Hi"}]},
        "did you mean 'human'",
    ),
    "sharegpt: no value": ({"conversations": [{"from": "human"}]}, "turn 1 has no value"),
    "sharegpt: no video": (_sharegpt("<video> Hi", "Yo"), "0 in video\\(s\\), 1 placeholders"),
    "sharegpt: video in the answer": (
        _sharegpt("<video>Hi", "<video>", videos=["ok.png"]),
        "turn 2 \\(gpt\\) contains a video",
    ),
    "sharegpt: weight of a question": (
        {"conversations": [{"from": "human", "value": "Hi", "weight": 2}]},
        "turn 1 \\(user\\) has a weight key",
    ),
    "sharegpt: in the answer": (_sharegpt("Hi", "<image>"), "contains a picture"),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.png").touch()
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    return tmp_path


def _write(folder, second, *, good=GOOD) -> str:
    line = second if isinstance(second, bytes) else json.dumps(second).encode()
    first = json.dumps({**good, "id": "first"}).encode()
    path = folder / "data.jsonl"
    path.write_bytes(first + b"\n" + line + b"\n" + json.dumps(good).encode() + b"\n")
    return str(path)


def _neighbours(name) -> dict:
    """A good row in the format of the bad one."""
    return _sharegpt("Hi", "Yo") if name.startswith("sharegpt") else GOOD


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_an_error_at_its_place(name, folder):
    second, reason = BAD_ROWS[name]
    path = _write(folder, second, good=_neighbours(name))
    with pytest.raises(ErrorGroup, match=reason) as caught:
        load_conversations([path])
    (error,) = caught.value.errors
    assert isinstance(error, SampleError)
    assert str(error).startswith(f"{path}:2: ")
    assert len(str(error)) < 1000


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_can_be_skipped_with_its_reason(name, folder):
    second, _ = BAD_ROWS[name]
    path = _write(folder, second, good=_neighbours(name))
    conversations, skipped = load_conversations([path], on_bad_sample="skip")
    assert [conversation.id for conversation in conversations] == ["first", "data:3"]
    ((row),) = skipped
    assert (row.id, row.source.line) == ("data:2", 2)
    assert "data.jsonl:2: " in row.reason


BAD_FILES = {
    "empty": (b"", "no sample in the file"),
    "blank lines": (b"\n \n\t\n", "no sample in the file"),
    "empty array": (b"[]", "no sample in the file"),
    "broken array": (b'[\n{"messages": []},\n{"messages": ]\n', r"data\.json:3: not JSON"),
    "array not UTF-8": (b'[\n"a",\n"\xff"]', r"data\.json:3: .*not UTF-8"),
    "array with Infinity": (b"[Infinity]", "Infinity is not a JSON value"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
def test_a_bad_file_is_an_error_even_where_rows_are_skipped(name, on_bad_sample, tmp_path):
    content, reason = BAD_FILES[name]
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(VlmtuneError, match=reason) as caught:
        load_conversations([path], on_bad_sample=on_bad_sample)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_a_folder_and_a_file_given_twice_are_errors(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD))
    for files, reason in (
        ([tmp_path / "none.jsonl"], "none.jsonl: no such data file"),
        ([tmp_path], "is a folder"),
        ([path, tmp_path / "." / "data.jsonl"], "listed twice"),
    ):
        with pytest.raises(VlmtuneError, match=reason):
            load_conversations(files)


def test_the_same_id_in_two_files_names_both(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**GOOD, "id": 7}))
    with pytest.raises(ErrorGroup, match=r"b\.jsonl:1: the id '7' is used twice.*a\.jsonl:1"):
        load_conversations([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def test_all_bad_rows_are_reported_at_once_and_the_rest_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(["{}"] * 25))
    with pytest.raises(ErrorGroup) as caught:
        load_conversations([path])
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert f"{path}:20: " in lines[19]
    assert lines[20] == "and 5 more bad rows"


def test_an_array_item_is_named_by_its_number(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, GOOD, {"messages": []}], indent=2))
    with pytest.raises(ErrorGroup, match=r"data\.json:3: messages is empty"):
        load_conversations([path])


# A picture that only shows itself as bad when it is decoded.
BAD_PICTURES = {
    "text": (b"this is no picture", "not a picture in a known format"),
    "cut off": ("cut", "cannot be decoded"),
    "too many pixels": ("large", "too many pixels.*300 x 300"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture in a known format"),
    "thin": ("thin", "aspect ratio"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
@pytest.mark.parametrize("inline", [False, True])
def test_a_bad_picture_is_a_sample_error_at_its_line(name, inline, tmp_path):
    content, reason = BAD_PICTURES[name]
    path = tmp_path / "bad.png"
    sizes = {"cut": (64, 64), "large": (300, 300), "thin": (2000, 2)}
    if isinstance(content, str):
        PIL.Image.effect_noise(sizes[content], 80).save(path)
        if content == "cut":
            path.write_bytes(path.read_bytes()[:-500])
    else:
        path.write_bytes(content)
    ref = "bad.png"
    if inline:
        ref = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    (tmp_path / "data.jsonl").write_text(json.dumps(_asked(_image(ref))))
    (conversation,), _ = load_conversations([tmp_path / "data.jsonl"])
    encoder = Encoder(
        cached_processor("qwen"), max_tokens=99, over_length="error", max_image_pixels=20_000
    )
    for encode in (encoder.encode, encoder.encode_prompt):
        with pytest.raises(SampleError, match=rf"data\.jsonl:1: .*{reason}"):
            encode(conversation)


# Rows that evaluation takes and training refuses.
UNTRAINABLE = {
    "answers only": (_messages(USER, answers=["Yo", "Ya"]), "no assistant turn.*`answers` only"),
    "answers to the last of two": (
        _messages(USER, ASSISTANT, USER, answers=["Yo"]),
        "the last turn is not answered",
    ),
    "train false": (_messages(USER, {**ASSISTANT, "train": False}), "nothing to learn"),
    "weights of zero": (
        _messages(USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "train": False}),
        "nothing to learn",
    ),
}


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_a_row_with_nothing_to_learn_is_for_evaluation_only(name, tmp_path):
    second, reason = UNTRAINABLE[name]
    path = _write(tmp_path, second)
    assert len(load_conversations([path])[0]) == 3
    with pytest.raises(ErrorGroup, match=rf"data\.jsonl:2: .*{reason}"):
        open_conversations([path], on_bad_sample="error")
    kept, skipped = open_conversations([path], on_bad_sample="skip")
    assert ([c.id for c in kept], len(skipped)) == (["first", "data:3"], 1)
