"""WebDataset shards from front to back: as by number, and with what came before passed over."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import PIL.Image
import pytest

from vlmtune.data.sources import tar as module
from vlmtune.data.sources.base import SpanRows
from vlmtune.data.sources.registry import open_rows
from vlmtune.data.sources.tar import open_tar
from vlmtune.data.stream import OpenStream, open_stream
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.recipe.data_section import DataEntry


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (3, 2), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    mode = "w" if path.name.endswith(".tar") else "w:gz"
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(count: int) -> list[tuple[str, bytes]]:
    """Pictures of many sizes, of none, and with long names, as shards have them."""
    files = []
    draw = random.Random(0)
    for number in range(count):
        key = f"part/{'long' * 40 if number == 3 else ''}{number:04d}"
        files.append((f"{key}.png", png("red") + draw.randbytes(draw.choice([0, 400, 40_000]))))
        files.append((f"{key}.json", json.dumps({"caption": f"number {number}"}).encode()))
        files.append((f"{key}.pickle", b""))
    return [("README", b"no sample"), *files]


def streamed(path: Path) -> SpanRows:
    return open_tar(path, cache_dir=path.parent / "cache", streaming=True)


def rows_of(shard: SpanRows, start: int = 0) -> list[dict]:
    return [dict(row.read()) for row in shard.iter_from(start)]


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz"])
def test_rows_are_those_by_number_from_any_of_them_on(tmp_path: Path, ending: str):
    plain = write_tar(tmp_path / "plain.tar", samples(30))
    by_number = open_tar(plain, cache_dir=tmp_path)
    expected = [dict(by_number[n]) for n in range(len(by_number))]
    assert len(expected) == 30 and expected[7]["caption"] == "number 7"
    shard = pickle.loads(pickle.dumps(streamed(write_tar(tmp_path / f"a{ending}", samples(30)))))
    assert rows_of(shard) == expected
    for start in (1, 17, 29, 30):
        assert rows_of(shard, start) == expected[start:]
        numbers = [(row.number, row.line) for row in shard.iter_from(start)]
        assert numbers == [(n, n + 1) for n in range(start, 30)]
    assert rows_of(shard, 16) != expected[17:]  # the wrong variant: one row off


def test_what_is_passed_over_is_neither_read_nor_parsed(tmp_path: Path, monkeypatch):
    whole = streamed(write_tar(tmp_path / "whole.tar.gz", samples(10)))
    sizes = [sum(len(pickle.dumps(row)) for row in whole.iter_from(0))]
    read = []
    monkeypatch.setattr(module, "_content", lambda tar, member: read.append(member.name) or b"x")
    monkeypatch.setattr(module, "row_of", pytest.fail)
    compressed = streamed(write_tar(tmp_path / "a.tar.gz", samples(10)))
    assert len(list(compressed.iter_from(8))) == 2
    assert [name.split("/")[1] for name in read] == [
        "0008.png", "0008.json", "0009.png", "0009.json",
    ]  # fmt: skip
    plain = streamed(write_tar(tmp_path / "a.tar", samples(10)))
    sizes.insert(0, sum(len(pickle.dumps(row)) for row in plain.iter_from(0)))
    assert sizes[0] < 10_000 < 100_000 < sizes[1]  # where the pictures are, or the pictures


def damaged(content: bytes, kind: str) -> bytes:
    middle = len(content) // 2 // 512 * 512
    if kind == "cut within a file":
        return content[: middle + 100]
    if kind == "rubbish after a file":
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            start = tar.getmembers()[-3].offset
        return content[:start] + b"x" * 512 + content[start + 512 :]
    return b"this is no tar file, " * 100


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
@pytest.mark.parametrize("kind", ["cut within a file", "rubbish after a file", "no tar file"])
def test_a_broken_shard_is_named_and_its_end_not_taken_for_a_whole(
    tmp_path: Path, ending: str, kind: str
):
    content = write_tar(tmp_path / "a.tar", samples(20)).read_bytes()
    path = tmp_path / f"broken{ending}"
    bad = damaged(content, kind)
    path.write_bytes(gzip.compress(bad) if ending == ".tar.gz" else bad)
    with pytest.raises(VlmtuneError, match="cannot be read as a tar file") as caught:
        rows_of(streamed(path))
    assert caught.value.file == str(path)


def test_a_bad_sample_is_a_bad_row_and_the_next_is_read(tmp_path: Path):
    files = samples(3)
    files[5] = (files[5][0], b"{broken")
    for name in ("a.tar", "a.tar.gz"):
        shard = streamed(write_tar(tmp_path / name, files))
        rows = list(shard.iter_from(0))
        with pytest.raises(SampleError, match=r"a\.tar.*:2: the json cannot be read"):
            rows[1].read()
        assert rows[2].read()["caption"] == "number 2"


def test_what_is_not_read_is_said_once_from_the_first_shard(tmp_path: Path, caplog):
    caplog.set_level("INFO", logger="vlmtune")
    for name in ("a.tar.gz", "b.tar.gz"):
        write_tar(tmp_path / name, samples(3))
    open_rows(DataEntry(path=str(tmp_path / "*.tar.gz")), cache_dir=tmp_path, streaming=True)
    (message,) = caplog.messages
    assert message.endswith(
        "a.tar.gz: unused files among the first 100: "
        ".pickle (3), hidden or without an extension (1)"
    )


def test_shards_are_streamed_as_samples_with_their_pictures(tmp_path: Path):
    for number in range(3):
        files = [
            (f"{number}-{n}.{ending}", content)
            for n in range(4)
            for ending, content in (("png", png("blue")), ("txt", f"a {n}".encode()))
        ]
        write_tar(tmp_path / f"shard-{number}.tar", files)
    entry = DataEntry(path=str(tmp_path / "shard-{0..2}.tar"))
    stream = open_stream([entry], seed=0, block_rows=5, cache_dir=tmp_path)
    opened = OpenStream(stream)
    found = [opened.take().conversation() for _ in range(12)]
    assert len({conversation.id for conversation in found}) == 12
    assert {conversation.images[0].content for conversation in found} == {png("blue")}
