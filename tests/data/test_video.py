"""Videos: which frames are taken, what is refused, and where their tokens stand in a sample."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.clips import brightness, turned, write_clip, write_frames
from tests.data.families import END, FAMILIES, LEAD
from tests.tiny_models import build_tiny_processor
from vlmtune.data.encode import Encoder
from vlmtune.data.types import IGNORED, Video
from vlmtune.data.video import FRAMES_LEFT_OUT, read_video
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.recipe.data_section import VideoSection

BUILDERS = FAMILIES | {"smolvlm": lambda: build_tiny_processor("smolvlm")}
WITH_VIDEO = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "smolvlm")


@pytest.fixture
def clip(tmp_path: Path) -> Video:
    """Two seconds of 10 frames each."""
    return Video(write_clip(tmp_path / "clip.mp4").name, tmp_path)


def frames_of(video: Video, **section):
    return read_video(video, section=VideoSection(**section), max_pixels=10**6)


def shades(clip) -> list[int]:
    return [round(float(np.asarray(frame).mean())) for frame in clip.frames]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"fps": 2.0}, (0, 6, 13, 19)),
        ({"fps": 5.0}, (0, 2, 4, 6, 8, 11, 13, 15, 17, 19)),
        ({"fps": 0.5, "min_frames": 4}, (0, 6, 13, 19)),  # one frame would be too few
        ({"fps": 10.0, "max_frames": 6}, (0, 4, 8, 11, 15, 19)),
        ({"fps": 30.0, "max_frames": 64}, tuple(range(20))),  # no more than there are
        ({"fps": 1.0, "min_frames": 3, "max_frames": 3}, (0, 19)),  # an even number
    ],
)
def test_frames_are_taken_evenly_by_the_recipes_budget(clip, section, expected):
    taken = frames_of(clip, **section)
    assert (taken.indices, taken.num_frames, taken.fps) == (expected, 20, 10.0)
    for index, shade in zip(expected, shades(taken), strict=True):
        assert abs(shade - brightness(index)) < 5  # of 10 from one frame to the next


def test_frames_are_those_that_qwen_vl_utils_takes(clip):
    from qwen_vl_utils.vision_process import smart_nframes

    for fps in (1.0, 2.0, 3.0, 7.0):
        number = smart_nframes({"fps": fps, "min_frames": 4, "max_frames": 64}, 20, 10.0)
        expected = torch.linspace(0, 19, number).round().long().tolist()
        assert list(frames_of(clip, fps=fps).indices) == expected


def test_larger_frames_are_shrunk_to_the_area_and_smaller_ones_left(clip):
    assert {frame.size for frame in frames_of(clip).frames} == {(64, 48)}
    assert {frame.size for frame in frames_of(clip, max_pixels=768).frames} == {(32, 24)}


def test_a_turned_video_is_shown_upright(clip):
    path = turned(clip.base_dir / clip.ref)
    assert frames_of(Video(path.name, clip.base_dir)).frames[0].size == (48, 64)


def test_a_videos_bytes_are_read_as_its_file(clip):
    content = (clip.base_dir / clip.ref).read_bytes()
    assert shades(frames_of(Video("clip", clip.base_dir, content))) == shades(frames_of(clip))


def test_pictures_are_frames_one_after_the_other(tmp_path):
    taken = frames_of(Video(write_frames(tmp_path, count=5), tmp_path), fps=4.0)
    assert taken.indices == (0, 1, 2, 3, 4) and taken.fps == 4.0 and taken.notes == ()
    assert shades(taken) == [brightness(index) for index in range(5)]
    assert taken.metadata()["duration"] == 1.25


def test_more_pictures_than_allowed_are_left_out_evenly_and_noted(tmp_path):
    taken = frames_of(Video(write_frames(tmp_path, count=9), tmp_path), max_frames=3, min_frames=2)
    assert taken.indices == (0, 4, 8) and taken.notes == (FRAMES_LEFT_OUT,)


def _audio_only(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)


def _break(path: Path, how: str) -> None:
    if how == "one frame":
        write_clip(path, num_frames=1)
    elif how == "audio only":
        _audio_only(path)
    else:
        write_clip(path.with_name("whole.avi" if how == "cut short" else "whole.mp4"))
        whole = path.with_name("whole.avi" if how == "cut short" else "whole.mp4").read_bytes()
        content = {
            "half": whole[: len(whole) // 2],
            "cut short": whole[: len(whole) * 2 // 3],
            "empty": b"",
            "text": b"no video at all\n" * 100,
            "playlist": b"#EXTM3U\n#EXTINF:2,\nwhole.mp4\n#EXT-X-ENDLIST\n",
            "concat": b"ffconcat version 1.0\nfile whole.mp4\n",
        }
        path.write_bytes(content[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("half", "cannot be decoded"),
        ("cut short", "cut off|cannot be decoded"),
        ("empty", "the video file is empty"),
        ("text", "cannot be decoded"),
        ("playlist", "cannot be decoded"),
        ("concat", "cannot be decoded"),
        ("audio only", "no video in the file"),
        ("one frame", "too few frames"),
    ],
)
def test_a_video_that_cannot_be_used_is_a_sample_error(how, message, tmp_path, make_conversation):
    _break(tmp_path / "bad.mp4", how)
    conversation = make_conversation(
        ("user", Video("bad.mp4", tmp_path), "What?"), ("assistant", "grey")
    )
    with pytest.raises(SampleError, match=rf"train\.jsonl:7: .*({message})"):
        encoder_of("qwen2_5_vl").encode(conversation)


def test_a_missing_file_and_missing_frames_are_sample_errors(tmp_path, make_conversation):
    for ref in ("gone.mp4", ("gone.png", "also.png")):
        conversation = make_conversation(
            ("user", Video(ref, tmp_path), "What?"), ("assistant", "grey")
        )
        with pytest.raises(SampleError, match=r"train\.jsonl:7: no such .* file.*gone"):
            encoder_of("qwen2_5_vl").encode(conversation)


def test_frames_of_different_sizes_are_refused(tmp_path):
    write_frames(tmp_path, count=2)
    (tmp_path / "1.png").rename(tmp_path / "2.png")
    write_frames(tmp_path, count=1, size=(32, 32))
    with pytest.raises(VlmtuneError, match="differ in size.*32 x 32, 64 x 48"):
        frames_of(Video(("0.png", "2.png"), tmp_path))
    with pytest.raises(VlmtuneError, match="too few frames"):
        frames_of(Video(("0.png",), tmp_path))


def test_a_frame_too_large_is_refused_before_it_is_decoded(clip):
    with pytest.raises(VlmtuneError, match="64 x 48 = 3072.*at most 3071"):
        read_video(clip, section=VideoSection(), max_pixels=3071)


@pytest.mark.parametrize("package", ["av", "qwen_vl_utils"])
def test_without_the_extra_the_error_says_how_to_install_it(clip, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(VlmtuneError, match=rf"{package}.*pip install -e '\.\[video\]'"):
        frames_of(clip)


def encoder_of(family: str, **options) -> Encoder:
    settings = {"max_tokens": 4096, "over_length": "error", "max_image_pixels": 10**6}
    return Encoder(BUILDERS[family](), **(settings | options))


def supervised(sample, processor) -> str:
    before = processor.tokenizer.convert_tokens_to_ids("?")
    ids = sample.targets[sample.targets != IGNORED].tolist()
    return processor.tokenizer.decode([before, *ids], skip_special_tokens=False)[1:]


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_the_answer_is_supervised_behind_a_video(family, clip, picture, make_conversation):
    encoder = encoder_of(family)
    lead, end = {**LEAD, "smolvlm": " "}[family], {**END, "smolvlm": "<end_of_utterance>"}[family]
    alone = encoder.encode(make_conversation(("user", clip, "What?"), ("assistant", "a clip")))
    assert supervised(alone, encoder.processor) == f"{lead}a clip{end}"
    assert (alone.num_images, alone.num_videos) == (0, 1)
    assert any(name.startswith("pixel_values") for name in alone.media)
    if family == "smolvlm":
        return  # its processor takes pictures or videos, not both
    both = encoder.encode(
        make_conversation(
            ("user", picture, "Red?"), ("assistant", "red"), ("user", clip, "?"), ("assistant", "b")
        )
    )
    assert supervised(both, encoder.processor) == f"{lead}red{end}{lead}b{end}"
    assert (both.num_images, both.num_videos) == (1, 1)


def test_a_videos_tokens_and_seconds_are_those_of_its_frames(clip, make_conversation):
    conversation = make_conversation(("user", clip, "What?"), ("assistant", "grey"))
    sample = encoder_of("qwen2_5_vl", video=VideoSection(fps=2.0)).encode(conversation)
    # 4 frames in pairs, 64 x 48 in patches of 8, 2 x 2 of them a token.
    assert sample.media["video_grid_thw"].tolist() == [[2, 6, 8]]
    assert int((sample.token_fields["mm_token_type_ids"] == 2).sum()) == 2 * 6 * 8 // 4
    # 4 of 20 frames at 10 a second: 2 a second, so that a pair takes one second.
    assert sample.media["second_per_grid_ts"].tolist() == [1.0]
    faster = encoder_of("qwen2_5_vl", video=VideoSection(fps=5.0)).encode(conversation)
    assert faster.media["video_grid_thw"].tolist() == [[5, 6, 8]]
    assert faster.media["second_per_grid_ts"].tolist() == pytest.approx([0.4])


def test_times_are_written_out_where_the_family_writes_them(clip, make_conversation):
    encoder = encoder_of("qwen3_vl", video=VideoSection(fps=2.0))
    sample = encoder.encode(make_conversation(("user", clip, "What?"), ("assistant", "grey")))
    text = encoder.processor.tokenizer.decode(sample.input_ids)
    # The frames 0 and 6, 13 and 19, at 10 a second.
    assert "<0.3 seconds>" in text and "<1.6 seconds>" in text


def test_a_video_too_long_is_shrunk_and_never_cut(clip, make_conversation):
    conversation = make_conversation(("user", clip, "What?"), ("assistant", "grey " * 20))
    whole = encoder_of("qwen2_5_vl").encode(conversation)
    limit = whole.num_tokens - 5
    shrunk = encoder_of("qwen2_5_vl", max_tokens=limit, over_length="shrink_images").encode(
        conversation
    )
    assert shrunk.num_tokens <= limit and torch.equal(
        shrunk.targets[shrunk.targets != IGNORED], whole.targets[whole.targets != IGNORED]
    )
    trimmed = encoder_of("qwen2_5_vl", max_tokens=limit, over_length="trim_text").encode(
        conversation
    )
    pads = whole.token_fields["mm_token_type_ids"].sum()
    assert trimmed.num_tokens == limit and trimmed.token_fields["mm_token_type_ids"].sum() == pads
    with pytest.raises(SampleError, match="leaves no answer"):
        encoder_of("qwen2_5_vl", max_tokens=20, over_length="trim_text").encode(conversation)


def test_a_model_without_videos_says_so(clip, make_conversation):
    conversation = make_conversation(("user", clip, "What?"), ("assistant", "grey"))
    for family in ("llava", "gemma3", "idefics3"):
        with pytest.raises(SampleError, match=r"train\.jsonl:7: the model does not accept videos"):
            encoder_of(family).encode(conversation)
