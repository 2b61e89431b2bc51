"""Which source an entry names: by content first, then by its ending; the rest is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmtune.data.sources.registry import open_rows
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.recipe.data_section import DataEntry

ROWS = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]


def _tar(path) -> None:
    with tarfile.open(path, "w") as tar:
        for n, row in enumerate(ROWS):
            content = json.dumps(row).encode()
            info = tarfile.TarInfo(f"{n}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _arrow(path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def _dataset(path) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(path)


WRITERS = {
    "jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "json": lambda path: path.write_text(json.dumps(ROWS)),
    "data.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "csv": lambda path: path.write_text("question,answer\na,1\nb,2\n"),
    "tsv": lambda path: path.write_text("question\tanswer\na\t1\nb\t2\n"),
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "arrow": _arrow,
    "tar": _tar,
    "saved": _dataset,
}


def _read(path, cache_dir, **keys) -> list:
    opened = open_rows(DataEntry(path=str(path), **keys), cache_dir=cache_dir)
    found = [rows[index] for rows in opened for index in range(len(rows))]
    return [{key: row[key] for key in ROWS[0]} for row in found]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_its_rows(tmp_path, cache_dir, kind):
    WRITERS[kind](tmp_path / f"a.{kind}")
    assert _read(tmp_path / f"a.{kind}", cache_dir) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_rows_from_front_to_back_are_those_by_number(tmp_path, cache_dir, kind, streaming):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path)
    (by_number,) = open_rows(DataEntry(path=str(path)), cache_dir=cache_dir)
    expected = [
        (number, by_number.place(number).line, by_number[number])
        for number in range(len(by_number))
    ]
    opened = open_rows(DataEntry(path=str(path)), cache_dir=cache_dir, streaming=streaming)
    (rows,) = pickle.loads(pickle.dumps(opened))
    for start in range(3):
        found = [(raw.number, raw.line, raw.read()) for raw in rows.iter_from(start)]
        assert found == expected[start:]
    assert len(expected) == 2 and found != expected  # the wrong variant: from another row on


@pytest.mark.parametrize("kind", ["jsonl", "tar", "parquet"])
def test_what_is_streamed_makes_no_index(tmp_path, cache_dir, always_kept, kind):
    WRITERS[kind](tmp_path / f"a.{kind}")
    entry = DataEntry(path=str(tmp_path / f"a.{kind}"))
    (rows,) = open_rows(entry, cache_dir=cache_dir, streaming=True)
    assert len(list(rows.iter_from(0))) == 2 and not cache_dir.exists()
    with pytest.raises(AssertionError, match="opened for streaming"):
        len(rows)


@pytest.mark.parametrize("kind", ["jsonl", "json", "data.json", "parquet", "arrow", "tar", "saved"])
def test_the_content_goes_before_the_name(tmp_path, cache_dir, kind):
    WRITERS[kind](tmp_path / "rows")
    assert _read(tmp_path / "rows", cache_dir) == ROWS


@pytest.mark.parametrize("pattern", ["a-*.jsonl", "a-{0..1}.jsonl", "a-{0,1}.jsonl"])
def test_each_shard_of_a_pattern_has_its_own_rows(tmp_path, cache_dir, pattern):
    for n in range(2):
        (tmp_path / f"a-{n}.jsonl").write_text(json.dumps({"n": n}))
    opened = open_rows(DataEntry(path=str(tmp_path / pattern)), cache_dir=cache_dir)
    assert [(rows.file, rows[0]) for rows in opened] == [
        (str(tmp_path / f"a-{n}.jsonl"), {"n": n}) for n in range(2)
    ]


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path, cache_dir):
    with pytest.raises(VlmtuneError, match="no file matches"):
        open_rows(DataEntry(path=str(tmp_path / "a-*.jsonl")), cache_dir=cache_dir)
    with pytest.raises(VlmtuneError, match="a-0.jsonl: no such data file"):
        open_rows(DataEntry(path=str(tmp_path / "a-{0..1}.jsonl")), cache_dir=cache_dir)


def test_json_is_told_by_what_it_starts_with(tmp_path, cache_dir):
    for name in ("a.txt", "a.dat", "a"):
        for text in ('\n {"a": 1}', '[{"a": 1}]', '\ufeff{"a": 1}\n'):
            (tmp_path / name).write_text(text)
            [rows] = open_rows(DataEntry(path=str(tmp_path / name)), cache_dir=cache_dir)
            assert rows[0] == {"a": 1}


REFUSED = {
    "a.jsonl.gz": (gzip.compress(b"{}"), "compressed.*data.streaming: true"),
    "a.tar.gz": (gzip.compress(b"{}"), "compressed.*data.streaming: true"),
    "a.csv.gz": (gzip.compress(b"a,b"), "compressed.*do: unpack it"),
    "a.jsonl": (gzip.compress(b"{}"), "compressed.*do: unpack it"),
    "a.zip": (b"PK\x03\x04rest", "compressed.*zip"),
    "utf16.jsonl": ('{"a": 1}'.encode("utf-16"), "UTF-16"),
    "a.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "has no known format"),
    "a.txt": (b"image,caption\na.png,A cat\n", "got: image,caption;.*name a table .csv"),
    "a.dat": (b"\x1b[31m a", r"no known format.*got: \\x1b\[31m a"),
    "a.parquet": (b"a,b\n1,2\n", "cannot be read as parquet"),
    "a.arrow": (b"a,b\n1,2\n", "cannot be read as Arrow"),
    "a.tar": (b"a,b\n1,2\n", "cannot be read as a tar file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_in_no_usable_form_is_named(tmp_path, cache_dir, name):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VlmtuneError, match=reason) as caught:
        open_rows(DataEntry(path=str(tmp_path / name)), cache_dir=cache_dir)
    assert caught.value.file == str(tmp_path / name)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path, cache_dir):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(VlmtuneError, match="no regular file"):
        open_rows(DataEntry(path=str(tmp_path / "pipe.jsonl")), cache_dir=cache_dir)


@pytest.fixture
def as_nobody():
    """Not root, who may read everything; nor the owner of what the test wrote."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture(params=["jsonl", "json", "csv", "parquet", "arrow", "tar"])
def unreadable(request, tmp_path):
    path = tmp_path / f"a.{request.param}"
    WRITERS[request.param](path)
    path.chmod(0)
    return path


def test_a_file_that_may_not_be_read_is_named(unreadable, cache_dir, as_nobody):
    with pytest.raises(VlmtuneError, match="cannot be read .Permission denied"):
        open_rows(DataEntry(path=str(unreadable)), cache_dir=cache_dir)


@pytest.mark.parametrize("kind", WRITERS)
def test_keys_that_have_no_effect_are_errors(tmp_path, cache_dir, kind):
    WRITERS[kind](tmp_path / f"a.{kind}")
    for key in ("split", "subset", "revision"):
        entry = DataEntry(path=str(tmp_path / f"a.{kind}"), **{key: "x"})
        reason = "no splits" if (kind, key) == ("saved", "split") else f"{key} has no effect"
        with pytest.raises(VlmtuneError, match=reason):
            open_rows(entry, cache_dir=cache_dir)


@pytest.mark.parametrize("kind", ["jsonl", "json", "data.json", "csv", "parquet", "arrow", "tar"])
def test_a_file_gone_after_opening_is_named(tmp_path, cache_dir, kind):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path)
    (rows,) = open_rows(DataEntry(path=str(path)), cache_dir=cache_dir)
    path.unlink()
    with pytest.raises(VlmtuneError, match="removed after|no such data file") as caught:
        rows[0]
    assert not isinstance(caught.value, SampleError)
    assert caught.value.file == str(path)
