"""Rows of any format to our own, whole or stopped and gone on with."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests.data.formats.examples import ROWS
from vlmtune.data.dataset import load_conversations, open_files
from vlmtune.data.formats.registry import FORMATS
from vlmtune.data.media import locate_image
from vlmtune.data.tools import convert as convert_module
from vlmtune.data.tools.convert import convert
from vlmtune.data.tools.message_rows import CannotWrite, MediaFiles, row_of
from vlmtune.data.types import Conversation, Image, MediaPolicy, Source, Text, Turn, Video
from vlmtune.errors import ErrorGroup, VlmtuneError
from vlmtune.recipe.data_section import DataEntry, FormatName

ANSWER = {"role": "assistant", "content": "red"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`in/` with pictures in `in/pics`."""
    (tmp_path / "in" / "pics").mkdir(parents=True)
    for name in ("red", "blue"):
        PIL.Image.new("RGB", (8, 6), name).save(tmp_path / "in" / "pics" / f"{name}.png")
    return tmp_path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ask(number: int, picture: str = "pics/red.png") -> dict[str, Any]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": f"What is {number}?"}]
    return {"id": f"row-{number}", "messages": [{"role": "user", "content": content}, ANSWER]}


def opened(*paths: Path, cache_dir: Path, media_policy: MediaPolicy = MediaPolicy()):
    entries = [DataEntry(path=str(path)) for path in paths]
    return open_files(entries, media_policy=media_policy, cache_dir=cache_dir)


def plain(conversation: Conversation) -> Conversation:
    """`conversation` with its pictures as their bytes, and without its place."""

    def part(item: Any) -> Any:
        if not isinstance(item, Image):
            return item
        found = locate_image(replace(item, media_policy=MediaPolicy(allow_outside_paths=True)))
        content = found if isinstance(found, bytes) else found.read_bytes()
        return Image("", Path(), content)

    turns = tuple(replace(t, parts=tuple(map(part, t.parts))) for t in conversation.turns)
    return replace(conversation, turns=turns, source=Source("", 0))


def load_plain(path: Path) -> list[Conversation]:
    loaded, _ = load_conversations([path], media_policy=MediaPolicy(allow_outside_paths=True))
    return [plain(conversation) for conversation in loaded]


def as_data_url(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def varied_rows(folder: Path) -> list[dict[str, Any]]:
    """All that a row of our own can hold."""
    url = as_data_url(folder / "in" / "pics" / "blue.png")
    bare = url.partition(",")[2]
    system = {"role": "system", "content": "Be brief."}
    return [
        ask(0),
        ask(1, url) | {"question_type": "color", "options": ["red", "blue"]},
        ask(2, bare) | {"answers": ["red", "dark <image> red"]},
        {
            "messages": [
                {"role": "user", "content": "Only text, with <image>\nin it \u2028 é 𝄞"},
                ANSWER,
            ]
        },
        {
            "id": 7,
            "messages": [system, {"role": "user", "content": " a "}, ANSWER, *ask(3)["messages"]],
        },
    ]


@pytest.mark.parametrize("copy_images", [False, True])
def test_what_is_converted_reads_back_the_same(folder: Path, copy_images: bool):
    source = write_rows(folder / "in" / "a.jsonl", varied_rows(folder))
    output = folder / "out" / "b.jsonl"
    done = convert(opened(source, cache_dir=folder), output, copy_images=copy_images)
    assert (done.num_rows, done.num_samples, done.bad.count) == (5, 5, 0)
    before = load_plain(source)
    assert load_plain(output) == before
    assert [c.id for c in before] == ["row-0", "row-1", "row-2", "a:4", "7"]
    # A wrong variant: another picture is not the same.
    output.write_text(output.read_text().replace("What is 0", "What was 0"))
    assert load_plain(output) != before


@pytest.mark.parametrize("copy_images", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_our_own(folder: Path, name: FormatName, copy_images: bool):
    source = write_rows(folder / "in" / "a.jsonl", ROWS[name])
    entry = DataEntry(path=str(source), format=name)
    files = open_files([entry], cache_dir=folder)
    before = [files[0].conversation(at) for at in range(3)]
    for number, image in enumerate(i for c in before for i in c.images):
        path = image.base_dir / image.ref
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    output = folder / "out" / "b.jsonl"
    convert(files, output, copy_images=copy_images)
    [again] = opened(
        output, cache_dir=folder, media_policy=MediaPolicy(allow_outside_paths=not copy_images)
    )
    assert again.format == "messages"
    after = [again.conversation(at) for at in range(3)]
    assert list(map(plain, after)) == list(map(plain, before))
    assert [c.id for c in after] == [c.id for c in before]


def test_weights_and_videos_are_written(folder: Path):
    clip = folder / "in" / "clip.mp4"
    clip.write_bytes(b"\0\0\0\x18ftypisom....")
    video = Video("clip.mp4", folder / "in")
    frames = Video(("pics/red.png", "pics/blue.png"), folder / "in")
    conversation = Conversation(
        "one",
        (
            Turn("user", (video, frames, Text("Which?"))),
            Turn("assistant", (Text("A."),), weight=0.0),
            Turn("user", (Text("And?"),)),
            Turn("assistant", (Text("B."),), weight=2.5),
        ),
        Source("a.jsonl", 1),
    )
    row = row_of(conversation, MediaFiles(folder / "in" / "b.jsonl", copy=False))
    first, second, _, last = row["messages"]
    assert first["content"] == [
        {"type": "video", "video": "clip.mp4"},
        {"type": "video", "video": ["pics/red.png", "pics/blue.png"]},
        {"type": "text", "text": "Which?"},
    ]
    assert second == {"role": "assistant", "content": "A.", "train": False}
    assert last == {"role": "assistant", "content": "B.", "weight": 2.5}


def test_files_are_referenced_relative_to_the_output(folder: Path):
    source = write_rows(folder / "in" / "a.jsonl", [ask(0)])
    below = convert(opened(source, cache_dir=folder), folder / "b.jsonl")
    assert below.num_outside == 0
    assert '"image": "in/pics/red.png"' in (folder / "b.jsonl").read_text()
    beside = convert(opened(source, cache_dir=folder), folder / "out" / "b.jsonl")
    assert beside.num_outside == 1
    assert '"image": "../in/pics/red.png"' in (folder / "out" / "b.jsonl").read_text()
    assert not (folder / "out" / "b_images").exists()


def test_a_reference_holds_from_a_linked_output_folder(folder: Path):
    (folder / "real" / "deep").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "real" / "deep")
    source = write_rows(folder / "in" / "a.jsonl", [ask(0)])
    convert(opened(source, cache_dir=folder), folder / "link" / "b.jsonl")
    assert load_plain(folder / "link" / "b.jsonl") == load_plain(source)


def test_copies_are_named_by_content_and_made_once(folder: Path):
    red = folder / "in" / "pics" / "red.png"
    (folder / "in" / "pics" / "again.jpeg").write_bytes(red.read_bytes())
    rows = [ask(0), ask(1, "pics/again.jpeg"), ask(2, as_data_url(red)), ask(3, "pics/blue.png")]
    source = write_rows(folder / "in" / "a.jsonl", rows)
    done = convert(opened(source, cache_dir=folder), folder / "b.jsonl", copy_images=True)
    assert done.num_pictures_written == 2
    names = sorted(path.name for path in (folder / "b_images").iterdir())
    assert len(names) == 2 and all(len(n) == 36 and n.endswith(".png") for n in names)


def test_all_bad_rows_are_named_and_nothing_is_left(folder: Path):
    rows = [ask(0), ask(1, "pics/gone.png"), ask(0), {"id": "x"}]
    source = write_rows(folder / "in" / "a.jsonl", rows)
    output = folder / "out" / "b.jsonl"
    with pytest.raises(ErrorGroup) as caught:
        convert(opened(source, cache_dir=folder), output)
    lines = str(caught.value).splitlines()
    assert [line.startswith(f"{source}:{at}: ") for line, at in zip(lines, (2, 3, 4))] == [True] * 3
    assert "gone.png" in lines[0] and "row-0" in lines[1]
    assert list((folder / "out").iterdir()) == []


def test_skipped_rows_are_written_with_their_reasons(folder: Path):
    rows = [ask(0), ask(1, "pics/gone.png"), ask(1), ask(1)]
    source = write_rows(folder / "in" / "a.jsonl", rows)
    output = folder / "b.jsonl"
    done = convert(opened(source, cache_dir=folder), output, on_bad_sample="skip")
    assert (done.num_samples, done.bad.count) == (2, 2)
    assert done.skipped == folder / "b_skipped.jsonl"
    refused = [json.loads(line) for line in done.skipped.read_text().splitlines()]
    # The id of a row that is not used stays free: row 3 has it, row 4 comes too late.
    assert [(r["file"], r["line"]) for r in refused] == [(str(source), 2), (str(source), 4)]
    assert [c.id for c in load_plain(output)] == ["row-0", "row-1"]
    mended = write_rows(folder / "in" / "a.jsonl", [ask(0)])
    again = convert(opened(mended, cache_dir=folder), output, on_bad_sample="skip", overwrite=True)
    assert again.skipped is None
    assert not (folder / "b_skipped.jsonl").exists()


def test_new_ids_are_those_of_places(folder: Path):
    rows = [ask(1), ask(1), ask(2)]
    files = [write_rows(folder / "in" / name, rows) for name in ("a.jsonl", "c.jsonl")]
    with pytest.raises(ErrorGroup, match="the id 'row-1' is used twice.*convert --new-ids"):
        convert(opened(*files, cache_dir=folder), folder / "b.jsonl")
    convert(opened(*files, cache_dir=folder), folder / "b.jsonl", new_ids=True)
    assert [c.id for c in load_plain(folder / "b.jsonl")] == [
        *("a:1", "a:2", "a:3"),
        *("c:1", "c:2", "c:3"),
    ]


def test_no_usable_row_is_an_error_even_with_skip(folder: Path):
    source = write_rows(folder / "in" / "a.jsonl", [{"id": "x"}])
    with pytest.raises(ErrorGroup):
        convert(opened(source, cache_dir=folder), folder / "b.jsonl", on_bad_sample="skip")
    assert not (folder / "b.jsonl").exists()


def test_keys_that_are_not_kept_are_counted(folder: Path):
    source = write_rows(folder / "in" / "a.jsonl", [ask(0) | {"mood": 1}, ask(1) | {"mood": 2}])
    assert convert(opened(source, cache_dir=folder), folder / "b.jsonl").unused == {"mood": 2}


class Stop(Exception):
    """Stands for the end of the process."""


def stop_at(number: int):
    def on_row(done: int) -> None:
        if done == number:
            raise Stop

    return on_row


@pytest.mark.parametrize("stops", [(1,), (3,), (5,), (2, 4), (1, 2, 3, 4, 5, 6)])
@pytest.mark.parametrize("copy_images", [False, True])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...], copy_images: bool
):
    rows = [*varied_rows(folder), ask(0), ask(8, "gone.png"), ask(8) | {"mood": 1}]
    source = write_rows(folder / "in" / "a.jsonl", rows)
    options: dict[str, Any] = {"copy_images": copy_images, "on_bad_sample": "skip"}
    whole = convert(opened(source, cache_dir=folder), folder / "whole" / "b.jsonl", **options)

    monkeypatch.setattr(convert_module, "SAVE_SECONDS", 0)
    output = folder / "stopped" / "b.jsonl"
    for number in stops:
        with pytest.raises(Stop):
            convert(opened(source, cache_dir=folder), output, on_row=stop_at(number), **options)
        assert not output.exists()
        with (output.parent / "b.jsonl.partial").open("ab") as stream:
            stream.write(b'{"id": "half a li')  # what a kill leaves
    done = convert(opened(source, cache_dir=folder), output, **options)

    # Row `number` itself was not yet saved when it was stopped.
    assert done.num_started_at == stops[-1] - 1
    assert output.read_bytes() == (folder / "whole" / "b.jsonl").read_bytes()
    skipped = [p / "b_skipped.jsonl" for p in (output.parent, folder / "whole")]
    assert skipped[0].read_bytes() == skipped[1].read_bytes()
    assert (done.num_samples, done.unused) == (whole.num_samples, whole.unused)
    assert (done.bad.count, done.bad.named) == (whole.bad.count, whole.bad.named)
    assert sorted(p.name for p in output.parent.iterdir()) == sorted(
        p.name for p in (folder / "whole").iterdir()
    )


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(convert_module, "SAVE_SECONDS", 0)
    source = write_rows(folder / "in" / "a.jsonl", [ask(n) for n in range(5)])
    output = folder / "b.jsonl"
    with pytest.raises(Stop):
        convert(opened(source, cache_dir=folder), output, on_row=stop_at(3))
    return source, output


def test_other_input_is_not_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch):
    source, output = stopped(folder, monkeypatch)
    write_rows(source, [ask(n) for n in range(6, 12)])
    with pytest.raises(VlmtuneError, match="other data"):
        convert(opened(source, cache_dir=folder), output)
    convert(opened(source, cache_dir=folder), output, overwrite=True)
    assert [c.id for c in load_plain(output)] == [f"row-{n}" for n in range(6, 12)]


@pytest.mark.parametrize(
    "option", [{"copy_images": True}, {"new_ids": True}, {"on_bad_sample": "skip"}]
)
def test_other_options_are_not_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, option: dict[str, Any]
):
    source, output = stopped(folder, monkeypatch)
    with pytest.raises(VlmtuneError, match="other data or options"):
        convert(opened(source, cache_dir=folder), output, **option)
    assert convert(opened(source, cache_dir=folder), output).num_started_at > 0


def test_a_lost_partial_means_a_new_start(folder: Path, monkeypatch: pytest.MonkeyPatch):
    source, output = stopped(folder, monkeypatch)
    (folder / "b.jsonl.partial").write_bytes(b"")
    done = convert(opened(source, cache_dir=folder), output)
    assert done.num_started_at == 0
    assert len(load_plain(output)) == 5


def test_a_broken_state_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch):
    source, output = stopped(folder, monkeypatch)
    (folder / "b.jsonl.state.json").write_text("{")
    with pytest.raises(VlmtuneError, match="overwrite"):
        convert(opened(source, cache_dir=folder), output)


def test_two_conversions_do_not_write_one_file(folder: Path):
    source = write_rows(folder / "in" / "a.jsonl", [ask(0)])
    with (folder / "b.jsonl.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(VlmtuneError, match="another conversion"):
            convert(opened(source, cache_dir=folder), folder / "b.jsonl")
    convert(opened(source, cache_dir=folder), folder / "b.jsonl")


def test_outputs_that_cannot_be(folder: Path):
    source = write_rows(folder / "in" / "a.jsonl", [ask(0)])
    files = opened(source, cache_dir=folder)
    before = source.read_bytes()
    with pytest.raises(VlmtuneError, match="one of the inputs"):
        convert(files, source, overwrite=True)
    assert source.read_bytes() == before
    entry = DataEntry(path=str(source), annotations=str(folder / "answers.json"))
    with pytest.raises(VlmtuneError, match="one of the inputs"):
        convert([replace(files[0], entry=entry)], folder / "answers.json", overwrite=True)
    for name in ("b.csv", "b", "b.jsonl.gz"):
        with pytest.raises(VlmtuneError, match="JSONL file; expected: a name that ends in .jsonl"):
            convert(files, folder / name)
    with pytest.raises(VlmtuneError, match="a folder"):
        convert(files, folder / "in")
    (folder / "taken.jsonl").write_text("mine")
    with pytest.raises(VlmtuneError, match="exists already"):
        convert(files, folder / "taken.jsonl")
    assert (folder / "taken.jsonl").read_text() == "mine"
    with pytest.raises(CannotWrite, match=r"taken\.jsonl"):
        convert(files, folder / "taken.jsonl" / "b.jsonl")


def test_a_full_disk_is_named_and_what_was_done_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(convert_module, "SAVE_SECONDS", 0)
    source = write_rows(folder / "in" / "a.jsonl", [ask(n) for n in range(5)])

    class SmallDisk(FileIO):
        """Takes 500 bytes, the last write in part."""

        def write(self, content: Any) -> int:
            room = max(0, 500 - self.tell())
            if room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content[:room])

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "FileIO", SmallDisk)
        with pytest.raises(CannotWrite, match="No space left on device"):
            convert(opened(source, cache_dir=folder), folder / "b.jsonl")
    done = convert(opened(source, cache_dir=folder), folder / "b.jsonl")
    assert done.num_started_at == 2  # a line has some 170 bytes
    assert [c.id for c in load_plain(folder / "b.jsonl")] == [f"row-{n}" for n in range(5)]


KILLED = """
import os, signal, sys
from pathlib import Path
from vlmtune.data.tools import convert as module
from vlmtune.data.dataset import open_files
from vlmtune.data.formats.registry import FORMATS
from vlmtune.recipe.data_section import DataEntry, FormatName

module.SAVE_SECONDS = 0
def on_row(done):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
files = open_files([DataEntry(path=sys.argv[1])], cache_dir=Path(sys.argv[3]))
module.convert(files, Path(sys.argv[2]), copy_images=True, on_row=on_row)
"""


def test_a_killed_process_is_gone_on_from(folder: Path):
    rows = [ask(n, f"pics/{'red' if n % 2 else 'blue'}.png") for n in range(6)]
    source = write_rows(folder / "in" / "a.jsonl", rows)
    convert(opened(source, cache_dir=folder), folder / "whole" / "b.jsonl", copy_images=True)
    output = folder / "killed" / "b.jsonl"
    command = [sys.executable, "-c", KILLED, str(source), str(output), str(folder / "cache")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not output.exists()
    done = convert(opened(source, cache_dir=folder), output, copy_images=True)
    assert done.num_started_at == 2
    assert output.read_bytes() == (folder / "whole" / "b.jsonl").read_bytes()
