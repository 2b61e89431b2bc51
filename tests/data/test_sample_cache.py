"""A sample from the cache is the one that the encoder makes, whatever happened to the files."""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import fields, replace
from pathlib import Path

import PIL.Image
import pytest
import torch

from tests.data.clips import write_clip, write_frames
from tests.data.conftest import cached_processor
from tests.data.families import FAMILIES
from tests.data.processors import build_processor
from vlmtune.data import media, sample_cache
from vlmtune.data.encode import Encoder
from vlmtune.data.types import Image, Sample, Source, Video
from vlmtune.errors import SampleError
from vlmtune.recipe.data_section import VideoSection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch):
    """How often an encoder made a sample."""
    calls: list[str] = []
    make = Encoder._make

    def counted(self, conversation):
        calls.append(conversation.id)
        return make(self, conversation)

    monkeypatch.setattr(Encoder, "_make", counted)
    return calls


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_same(one: Sample, other: Sample) -> None:
    for entry in fields(Sample):
        a, b = getattr(one, entry.name), getattr(other, entry.name)
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
            assert all(a[name].dtype == b[name].dtype for name in a)
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype
        else:
            assert a == b, entry.name


@pytest.fixture
def asked(make_conversation, picture):
    conversation = make_conversation(
        ("user", picture, "Red?"), ("assistant", "yes"), ("user", "Sure?"), ("assistant", "  ja")
    )
    turns = list(conversation.turns)
    turns[1] = replace(turns[1], weight=0.5)
    return replace(conversation, turns=tuple(turns))


def test_a_kept_sample_equals_a_made_one(kind, make_encoder, asked, folder, made):
    expected = make_encoder(kind).encode(asked)
    for _ in range(2):
        assert_same(make_encoder(kind, cache_dir=folder).encode(asked), expected)
    assert len(made) == 2  # without a cache, and the first of the two
    assert len(files_of(folder)) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_tensors_can_be_kept(family, asked, folder):
    def encode(**options) -> Sample:
        settings = {"max_tokens": 999, "over_length": "error", "max_image_pixels": 10**6}
        return Encoder(FAMILIES[family](), **settings, **options).encode(asked)

    assert_same(encode(cache_dir=folder), encode())
    assert_same(encode(cache_dir=folder), encode())


def test_videos_and_notes_are_kept(make_encoder, make_conversation, folder, tmp_path, made):
    frames = Video(write_frames(tmp_path, count=9), tmp_path)
    clip = Video(write_clip(tmp_path / "clip.mp4").name, tmp_path)
    conversation = make_conversation(("user", clip, frames, "What?"), ("assistant", "grey"))
    options = {"video": VideoSection(max_frames=4), "cache_dir": folder}
    first = make_encoder("qwen", **options).encode(conversation)
    assert_same(make_encoder("qwen", **options).encode(conversation), first)
    assert len(made) == 1 and first.num_videos == 2 and first.notes
    write_clip(tmp_path / "clip.mp4", num_frames=10)
    make_encoder("qwen", **options).encode(conversation)
    assert len(made) == 2


def test_the_same_content_in_another_row_is_served_with_its_own_place(
    make_encoder, asked, folder, made
):
    encoder = make_encoder("qwen", cache_dir=folder)
    first = encoder.encode(asked)
    other = encoder.encode(replace(asked, id="other", source=Source("b.jsonl", 3), answers=("x",)))
    assert len(made) == 1
    assert (other.id, other.source) == ("other", Source("b.jsonl", 3))
    assert_same(replace(other, id=first.id, source=first.source), first)


def _repaint(picture: Image, colour: str) -> None:
    """Another picture of the same number of bytes, changed a moment later."""
    path = picture.base_dir / picture.ref
    before = path.stat()
    PIL.Image.new("RGB", (64, 48), colour).save(path, "BMP")
    if path.stat().st_size == before.st_size:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def test_a_changed_picture_is_made_anew(make_encoder, asked, picture, folder, monkeypatch):
    _repaint(picture, "red")
    encoder = make_encoder("qwen", cache_dir=folder)
    red = encoder.encode(asked)
    _repaint(picture, "blue")
    blue = encoder.encode(asked)
    assert not torch.equal(red.media["pixel_values"], blue.media["pixel_values"])
    assert_same(blue, make_encoder("qwen").encode(asked))
    # The wrong variant: without the time of change, the old picture is served.
    monkeypatch.setattr(media, "file_state", lambda path: (str(path), path.stat().st_size))
    green = make_encoder("qwen", cache_dir=folder / "other")
    blue = green.encode(asked)
    _repaint(picture, "green")
    assert_same(green.encode(asked), blue)


def test_a_picture_that_changes_while_it_is_read_is_not_kept(
    make_encoder, asked, picture, folder, monkeypatch
):
    _repaint(picture, "red")
    make = Encoder._make

    def slow(self, conversation):
        sample = make(self, conversation)
        _repaint(picture, "blue")
        return sample

    monkeypatch.setattr(Encoder, "_make", slow)
    make_encoder("qwen", cache_dir=folder).encode(asked)
    assert files_of(folder) == []


def _changed(asked, **changes):
    return replace(asked, turns=(*asked.turns[:-1], replace(asked.turns[-1], **changes)))


def test_what_changes_a_sample_changes_its_key(make_encoder, asked, folder, made):
    make_encoder("qwen", cache_dir=folder).encode(asked)
    text = replace(asked.turns[-1].parts[0], text="nein")
    others = [
        lambda: make_encoder("qwen", cache_dir=folder).encode(_changed(asked, parts=(text,))),
        lambda: make_encoder("qwen", cache_dir=folder).encode(_changed(asked, weight=3.0)),
        lambda: make_encoder("qwen", cache_dir=folder, train_on="last_turn").encode(asked),
        lambda: make_encoder("qwen", cache_dir=folder, max_tokens=500).encode(asked),
        lambda: make_encoder("qwen", cache_dir=folder, over_length="trim_text").encode(asked),
        lambda: make_encoder("qwen", cache_dir=folder, video=VideoSection(fps=1.0)).encode(asked),
        lambda: make_encoder("llava", cache_dir=folder).encode(asked),
    ]
    for number, encode in enumerate(others, start=2):
        encode()
        assert len(made) == number == len(files_of(folder))


def test_what_changes_a_processor_changes_its_fingerprint():
    def fingerprint(change=lambda processor: None) -> str:
        processor = build_processor("qwen")
        change(processor)
        return sample_cache.fingerprint_of(processor, {})

    def smaller(processor) -> None:
        processor.image_processor.size = {"shortest_edge": 256, "longest_edge": 1024}

    def other_template(processor) -> None:
        processor.chat_template += " "

    def more_tokens(processor) -> None:
        processor.tokenizer.add_tokens(["<more>"])

    def other_video(processor) -> None:
        processor.video_processor.size = {"shortest_edge": 256, "longest_edge": 1024}

    changes = [smaller, other_template, more_tokens, other_video]
    assert len({fingerprint(), *(fingerprint(change) for change in changes)}) == 5
    # A call leaves traces in a tokenizer, which are not of it.
    assert fingerprint(lambda p: p.tokenizer(["a", "b c"], padding=True)) == fingerprint()


def test_a_damaged_file_is_made_anew(make_encoder, asked, folder, made, caplog):
    logging.getLogger("vlmtune").propagate = True
    encoder = make_encoder("qwen", cache_dir=folder)
    expected = encoder.encode(asked)
    (file,) = files_of(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):
        assert_same(encoder.encode(asked), expected)
    assert "made again" in caplog.text
    assert len(made) == 2  # once, and once for the damaged file
    assert file.read_bytes() == whole


def test_where_nothing_can_be_kept_samples_are_made(make_encoder, asked, tmp_path, made, caplog):
    logging.getLogger("vlmtune").propagate = True
    (tmp_path / "file").write_text("no folder")
    encoder = make_encoder("qwen", cache_dir=tmp_path / "file")
    expected = make_encoder("qwen").encode(asked)
    for _ in range(3):
        assert_same(encoder.encode(asked), expected)
    assert len(made) == 4
    (record,) = caplog.records
    assert "no more samples are cached on disk" in record.getMessage()


def test_what_cannot_be_used_is_not_kept(make_encoder, make_conversation, asked, folder):
    encoder = make_encoder("qwen", cache_dir=folder, max_tokens=12)
    gone = make_conversation(("user", Image("gone.png", folder), "?"), ("assistant", "a"))
    for conversation, message in ((asked, "too long"), (gone, "no such picture file")):
        for _ in range(2):
            with pytest.raises(SampleError, match=message):
                encoder.encode(conversation)
    assert files_of(folder) == []


def test_prompts_are_never_kept(make_encoder, asked, folder):
    make_encoder("qwen", cache_dir=folder).encode_prompt(asked)
    assert files_of(folder) == []


def test_an_encoder_with_a_cache_survives_pickling(make_encoder, asked, folder, made):
    encoder = make_encoder("qwen", cache_dir=folder)
    expected = encoder.encode(asked)
    assert_same(pickle.loads(pickle.dumps(encoder)).encode(asked), expected)
    assert len(made) == 1
    assert cached_processor("qwen") is encoder.processor
