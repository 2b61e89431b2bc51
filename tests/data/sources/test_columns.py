"""Parquet and Arrow by number: the values that pyarrow itself reads, bytes included."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from vlmtune.data.sources import arrow
from vlmtune.data.sources.arrow import ArrowBatches, RowGroups, open_arrow, open_parquet
from vlmtune.errors import VlmtuneError

ROWS = [
    {
        "image": {"bytes": bytes([n, 255]), "path": f"{n}.png"},
        "raw": b"\x00" * n,
        "question": f"é{n}" if n % 3 else None,
        "answers": [f"a{i}" for i in range(n % 4)],
        "messages": [{"role": "user", "content": str(n)}],
    }
    for n in range(23)
]
TABLE = pa.Table.from_pylist(ROWS)


def _parquet(path):
    pq.write_table(TABLE, path, row_group_size=5)
    return open_parquet(path, cache_dir=path.parent / "cache")


def _arrow_file(path):
    with pa.ipc.new_file(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=4)
    return open_arrow(path, cache_dir=path.parent / "cache")


def _arrow_stream(path):
    with pa.ipc.new_stream(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=4)
    return open_arrow(path, cache_dir=path.parent / "cache")


def _feather(path):
    pa.feather.write_feather(TABLE, str(path), compression="lz4", chunksize=7)
    return open_arrow(path, cache_dir=path.parent / "cache")


KINDS = [_parquet, _arrow_file, _arrow_stream, _feather]


@pytest.mark.parametrize("write", KINDS)
def test_rows_in_any_order_are_those_that_were_written(tmp_path, write):
    rows = write(tmp_path / "data")
    order = [n * 7 % len(ROWS) for n in range(len(ROWS))]
    assert len(rows) == len(ROWS)
    assert [rows[n] for n in order] == [ROWS[n] for n in order]
    assert [rows[n] for n in order] != ROWS
    assert [rows.place(n).line for n in (0, 22)] == [1, 23]


@pytest.mark.parametrize("write", KINDS)
def test_rows_are_read_after_pickling(tmp_path, write):
    rows = write(tmp_path / "data")
    rows[3]
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000  # no row is in it
    again = pickle.loads(pickled)
    assert [again[n] for n in range(len(again))] == ROWS


def _sixth(rows) -> dict:
    return rows[6]


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize("copied", [False, True])
def test_rows_are_read_in_forked_processes_after_the_parent_has_read(
    tmp_path, write, copied, monkeypatch
):
    if copied:
        monkeypatch.setattr(arrow, "LARGE_GROUP_BYTES", 1)
    rows = write(tmp_path / "data")
    rows[0]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(_sixth, [rows] * 4, timeout=60)) == [ROWS[6]] * 4


def test_one_row_group_is_read_once_for_its_neighbours(tmp_path, monkeypatch):
    rows = _parquet(tmp_path / "data")
    read = []
    plain = pq.ParquetFile.read_row_group

    def counted(self, number, **kwargs):
        read.append(number)
        return plain(self, number, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for n in (0, 1, 4, 5, 9, 22, 0):
        rows[n]
    assert read == [0, 1, 4, 0]


@pytest.fixture
def large(monkeypatch):
    """Row groups of any size count as large."""
    monkeypatch.setattr(arrow, "LARGE_GROUP_BYTES", 1)


def test_large_row_groups_are_copied_once_and_read_by_row(tmp_path, large, caplog):
    with caplog.at_level("INFO", logger="vlmtune"):
        first = _parquet(tmp_path / "data")
        second = open_parquet(tmp_path / "data", cache_dir=tmp_path / "cache")
    (record,) = caplog.records
    assert "for reading by row" in record.getMessage()
    for rows in (first, second, pickle.loads(pickle.dumps(second))):
        assert isinstance(rows.batches, ArrowBatches)
        assert [rows[n] for n in reversed(range(len(rows)))] == ROWS[::-1]
        assert (rows.file, rows.base_dir) == (str(tmp_path / "data"), tmp_path)
        assert rows.place(2).file == rows.file
    assert len(list((tmp_path / "cache" / "arrow").iterdir())) == 1


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-9]])
def test_a_copy_that_is_damaged_or_of_an_earlier_file_is_made_anew(tmp_path, large, damage):
    _parquet(tmp_path / "data")
    (copy,) = (tmp_path / "cache" / "arrow").iterdir()
    copy.write_bytes(damage(copy.read_bytes()))
    assert _parquet(tmp_path / "data")[3] == ROWS[3]
    pq.write_table(TABLE.slice(4), tmp_path / "data")
    rows = open_parquet(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert (len(rows), rows[0]) == (len(ROWS) - 4, ROWS[4])


def test_a_file_that_changed_since_its_copy_was_opened_is_named(tmp_path, large):
    rows = _parquet(tmp_path / "data")
    pq.write_table(TABLE.slice(4), tmp_path / "data")
    with pytest.raises(VlmtuneError, match="changed since") as caught:
        rows[0]
    assert caught.value.file == str(tmp_path / "data")


def test_without_room_for_a_copy_the_row_groups_are_read_and_that_is_said(tmp_path, large, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    rows = _parquet(tmp_path / "data")
    assert isinstance(rows.batches, RowGroups) and rows[22] == ROWS[22]
    assert "a copy cannot be written" in caplog.text and "data.streaming: true" in caplog.text


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "start"])
def test_a_broken_file_is_named(tmp_path, write, damage):
    path = tmp_path / "data"
    write(path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"a,b\n1,2\n",
            "cut": content[: len(content) // 2],
            "start": b"PAR1",
        }[damage]
    )
    with pytest.raises(VlmtuneError, match="cannot be read as") as caught:
        if write is _parquet:
            open_parquet(path, cache_dir=tmp_path)
        else:
            open_arrow(path, cache_dir=tmp_path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("write", KINDS)
def test_a_file_that_changed_while_open_is_named(tmp_path, write):
    path = tmp_path / "data"
    rows = write(path)
    path.write_bytes(b"other")
    with pytest.raises(VlmtuneError, match="changed since"):
        rows[0]


def test_a_column_name_given_twice_is_an_error(tmp_path):
    table = pa.table([[1], [2]], names=["a", "a"])
    with pa.ipc.new_file(str(tmp_path / "data"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(VlmtuneError, match="two columns have the same name"):
        open_arrow(tmp_path / "data", cache_dir=tmp_path)
