"""Questions about videos: told apart by files, resampled together, answered by the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.evaluating import run_eval
from tests.data.clips import write_clip, write_frames
from vlmtune.data.types import Conversation, Source, Text, Turn, Video
from vlmtune.evaluation.answer_log import samples_digest
from vlmtune.evaluation.runner import score_answers


def about(video: Video, number: int) -> Conversation:
    turns = (Turn("user", (video, Text("Light?"))), Turn("assistant", (Text("yes"),)))
    return Conversation(str(number), turns, Source("rows.jsonl", number))


def test_samples_on_one_video_are_resampled_together(tmp_path: Path):
    """As those on one picture: twelve answers about two videos are little more than two."""
    frames = Video(write_frames(tmp_path, count=2), tmp_path)
    clip = Video(write_clip(tmp_path / "clip.mp4", num_frames=4).name, tmp_path)
    texts = ["yes"] * 6 + ["no"] * 6
    videos = [frames] * 6 + [clip] * 6
    asked = [about(video, number) for number, video in enumerate(videos)]
    exact = score_answers(asked, texts, task="vqa").metrics["exact_match"]
    assert (exact.low, exact.value, exact.high) == (0, 0.5, 1)
    clips = [shutil.copy(tmp_path / "clip.mp4", tmp_path / f"{n}.mp4") for n in range(12)]
    apart = [about(Video(Path(c).name, tmp_path), n) for n, c in enumerate(clips)]
    exact = score_answers(apart, texts, task="vqa").metrics["exact_match"]
    assert 0 < exact.low < 0.5 < exact.high < 1


@pytest.mark.parametrize("kind", ["file", "frames"])
def test_answers_are_not_those_of_another_video_under_the_same_name(tmp_path: Path, kind: str):
    clip = write_clip(tmp_path / "clip.mp4", num_frames=4)
    frames = write_frames(tmp_path, count=2)
    asked = [about(Video(clip.name if kind == "file" else frames, tmp_path), 1)]
    digest = samples_digest(asked)
    assert samples_digest(asked) == digest
    write_clip(clip, num_frames=8)
    write_frames(tmp_path, count=2, size=(32, 32))
    assert samples_digest(asked) != digest


def test_the_command_answers_about_videos_and_takes_none_for_blank(tiny_vlm, tmp_path: Path):
    write_clip(tmp_path / "clip.mp4", num_frames=4)
    parts = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "Light?"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}], "answers": [answer]}
        for answer in ("yes", "no")
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (tiny_vlm, "--data", data, "eval.max_new_tokens=2", "--output", tmp_path / "out")
    code, stdout, stderr = run_eval(*options, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["num_samples"] == 2
    code, _, stderr = run_eval(*options, "--blind", "--train", data)
    assert code == 2 and "only a picture can be made blank" in stderr
