"""JSON lines by number: the same rows and lines as reading from front to back."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tracemalloc
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.data.sources.base import SpanRows, stamp_of
from vlmtune.data.sources.json_text import parse_line
from vlmtune.data.sources.jsonl import open_jsonl, scan_lines
from vlmtune.errors import SampleError, VlmtuneError

BOM = b"\xef\xbb\xbf"


def _plainly(content: bytes) -> list[tuple[int, bytes]]:
    """(line, text) of the lines that are not blank, by splitting the whole content."""
    lines = content.removeprefix(BOM).split(b"\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


@given(
    lines=st.lists(st.sampled_from([b"", b" ", b"\t\r", b"\x0b", b"{}", b'{"a": 1}\r', b"  x  "])),
    bom=st.booleans(),
    ends_with_break=st.booleans(),
    chunk_bytes=st.integers(3, 40),
)
def test_lines_are_found_wherever_the_chunks_end(
    tmp_path_factory, lines, bom, ends_with_break, chunk_bytes
):
    content = (BOM if bom else b"") + b"\n".join(lines) + (b"\n" if ends_with_break else b"")
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(content)
    pieces = [np.empty((0, 3), np.int64), *scan_lines(path, chunk_bytes=chunk_bytes)]
    found = [(line, content[start:end]) for start, end, line in np.concatenate(pieces).tolist()]
    assert found == _plainly(content)


@pytest.fixture
def file(tmp_path):
    rows = [{"id": n, "text": "é" * (n % 7), "more": list(range(n % 5))} for n in range(500)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines[3:3] = ["", "   "]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _read_all(rows) -> list:
    return [rows[index] for index in range(len(rows))]


@pytest.mark.parametrize("again", [False, True])
def test_rows_by_number_are_those_of_a_plain_reading(file, cache_dir, always_kept, again):
    if again:
        open_jsonl(file, cache_dir=cache_dir)
    rows = open_jsonl(file, cache_dir=cache_dir)
    plain = [(n, json.loads(line)) for n, line in _plainly(file.read_bytes())]
    assert _read_all(rows) == [row for _, row in plain]
    assert [rows.place(index).line for index in range(len(rows))] == [n for n, _ in plain]
    assert isinstance(rows.table.values, np.memmap)


def test_the_index_of_another_file_gives_other_rows(file, tmp_path, cache_dir):
    other = tmp_path / "other.jsonl"
    other.write_text(file.read_text(encoding="utf-8").replace('"id": 1,', '"id": 1 ,'), "utf-8")
    foreign = open_jsonl(other, cache_dir=cache_dir).table
    rows = SpanRows(((file, stamp_of(file)),), foreign, parse_line)
    assert rows[0] == {"id": 0, "text": "", "more": []}
    with pytest.raises(SampleError, match="not JSON"):
        _read_all(rows)


def _third(rows) -> object:
    return rows[2]


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("kept", [False, True])
def test_rows_are_read_in_other_processes(file, cache_dir, method, kept, request):
    if kept:
        request.getfixturevalue("always_kept")
    rows = open_jsonl(file, cache_dir=cache_dir)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(_third, [rows] * 4)) == [rows[2]] * 4


def test_a_mapped_index_is_pickled_by_its_place(file, cache_dir, always_kept):
    rows = open_jsonl(file, cache_dir=cache_dir)
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000
    assert _read_all(pickle.loads(pickled)) == _read_all(rows)
    (kept,) = (cache_dir / "index").iterdir()
    kept.unlink()
    with pytest.raises(VlmtuneError, match="index was removed"):
        pickle.loads(pickled)


def test_opening_and_reading_take_the_same_memory_for_any_number_of_rows(tmp_path, cache_dir):
    peaks = []
    for num_rows in (60_000, 240_000):
        path = tmp_path / f"{num_rows}.jsonl"
        path.write_bytes(b'{"id": "%s"}\n' % (b"x" * 150) * num_rows)
        tracemalloc.start()
        rows = open_jsonl(path, cache_dir=cache_dir)
        assert len(rows) == num_rows
        for index in range(0, num_rows, num_rows // 100):
            rows[index]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    held = 240_000 * rows.table.values.shape[1] * 8
    assert peaks[1] - peaks[0] < held / 2
    # What holding the table costs is more than the bound: a copy of it would be seen.
    tracemalloc.start()
    copy = np.array(rows.table.values)
    assert copy.nbytes == held and tracemalloc.get_traced_memory()[1] > held / 2
    tracemalloc.stop()


def test_a_file_that_changed_while_open_is_named(file, cache_dir):
    rows = open_jsonl(file, cache_dir=cache_dir)
    with file.open("ab") as stream:
        stream.write(b"\n{}")
    with pytest.raises(VlmtuneError, match="has changed since") as caught:
        rows[0]
    assert not isinstance(caught.value, SampleError)
    assert caught.value.file == str(file)


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_seen(file, tmp_path, cache_dir):
    rows = open_jsonl(file, cache_dir=cache_dir)
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    status = file.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(copy, file)
    with pytest.raises(VlmtuneError, match="has changed since"):
        rows[0]


def test_a_file_deleted_while_open_is_named(file, cache_dir):
    rows = open_jsonl(file, cache_dir=cache_dir)
    file.unlink()
    with pytest.raises(VlmtuneError, match="removed after it was opened") as caught:
        rows[0]
    assert caught.value.file == str(file)
