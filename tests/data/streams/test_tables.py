"""Parquet, CSV and data sets of the `datasets` library, from front to back."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from vlmtune.data.sources.arrow import BatchRows, open_parquet
from vlmtune.data.sources.hf import files_of
from vlmtune.data.sources.registry import open_rows
from vlmtune.data.stream import OpenStream, StreamCursor, open_stream, stream_identity
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.recipe.data_section import DataEntry


def table(start: int, count: int) -> pyarrow.Table:
    numbers = range(start, start + count)
    return pyarrow.table(
        {
            "image": [{"bytes": b"picture %d" % n, "path": f"{n}.png"} for n in numbers],
            "caption": [f"number {n}" for n in numbers],
        }
    )


def write_parquet(path: Path, *, start: int = 0, count: int = 300, group: int = 70) -> Path:
    pyarrow.parquet.write_table(table(start, count), path, row_group_size=group)
    return path


def parsed(shard, start: int = 0) -> list[dict]:
    return [dict(row.read()) for row in shard.iter_from(start)]


def streamed(path: Path) -> BatchRows:
    return open_parquet(path, cache_dir=path.parent / "cache", streaming=True)


@pytest.mark.parametrize("kind", ["time", "text"])
def test_a_row_that_python_cannot_hold_is_named_and_the_others_are_read(tmp_path: Path, kind: str):
    times = pyarrow.array([0, 2**62, 0], pyarrow.timestamp("us"))
    ends = b"".join(n.to_bytes(4, "little") for n in (0, 1, 2, 3))
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(b"a\xffb")]
    )
    rows = table(0, 3).append_column("odd", times if kind == "time" else texts)
    pyarrow.parquet.write_table(rows, tmp_path / "rows.parquet")
    entry = DataEntry(path=str(tmp_path / "rows.parquet"))
    stream = open_stream([entry], seed=0, block_rows=10, cache_dir=tmp_path)
    read = {}
    for row in stream.every_row():
        try:
            read[row.source.line] = row.conversation().turns[-1].text
        except SampleError as error:
            read[row.source.line] = str(error)
    assert (read[1], read[3]) == ("number 0", "number 2")
    assert read[2].startswith(f"{entry.path}:2: the row's values cannot be read")


def test_parquet_rows_are_the_tables_from_any_of_them_on(tmp_path: Path):
    shard = pickle.loads(pickle.dumps(streamed(write_parquet(tmp_path / "a.parquet"))))
    expected = table(0, 300).to_pylist()
    for start in (0, 1, 69, 70, 200, 299, 300):
        assert parsed(shard, start) == expected[start:]
        assert [row.number for row in shard.iter_from(start)] == list(range(start, 300))
    assert parsed(shard, 70) != expected[71:]


def test_row_groups_that_are_passed_over_are_not_read(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet")
    with pyarrow.parquet.ParquetFile(path) as file:
        first = file.metadata.row_group(0).column(0)
        start = first.dictionary_page_offset or first.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + first.total_compressed_size] = bytes(first.total_compressed_size)
    path.write_bytes(content)
    assert parsed(streamed(path), 70) == table(70, 230).to_pylist()
    with pytest.raises(VlmtuneError, match="cannot be read as parquet") as caught:
        parsed(streamed(path), 0)
    assert caught.value.file == str(path)


def test_what_is_no_parquet_is_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet at all, whatever its name")
    with pytest.raises(VlmtuneError, match="cannot be read as parquet"):
        parsed(streamed(path))


def write_csv(path: Path, count: int) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows([f"What is\n{n}, then?", f"number {n}"] for n in range(count))
    return path


def write_table(path: Path) -> Path:
    return write_csv(path, 40) if path.suffix == ".csv" else write_parquet(path, count=40, group=7)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_table_is_streamed_and_goes_on_from_its_cursor(tmp_path: Path, name: str):
    entry = DataEntry(path=str(write_table(tmp_path / name)))
    stream = open_stream([entry], seed=1, block_rows=9, cache_dir=tmp_path)

    def answers(opened: OpenStream, count: int) -> list[str]:
        return [opened.take().conversation().turns[-1].text for _ in range(count)]

    whole = answers(OpenStream(stream), 70)
    assert sorted(whole[:40]) == sorted(f"number {n}" for n in range(40)) != whole[:40]
    opened = OpenStream(stream)
    answers(opened, 47)
    cursor = StreamCursor.from_dict(opened.cursor.as_dict())
    assert answers(OpenStream(stream, cursor), 23) == whole[47:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set as the hub has them: two parquet files of a split, one of another."""
    folder = tmp_path_factory.mktemp("set")
    write_parquet(folder / "train-00000-of-00002.parquet", count=11)
    write_parquet(folder / "train-00001-of-00002.parquet", start=11, count=9)
    write_parquet(folder / "test-00000-of-00001.parquet", start=90, count=3)
    return folder


def test_a_data_set_is_streamed_file_by_file_with_its_pictures_as_stored(folder: Path):
    shards = files_of(str(folder), DataEntry(path="hub:one/set", split="train"))
    assert [shard.file for shard in shards] == [
        "hub:one/set/train/1-of-2",
        "hub:one/set/train/2-of-2",
    ]
    expected = table(0, 20).to_pylist()
    assert parsed(shards[0]) == expected[:11]
    assert parsed(pickle.loads(pickle.dumps(shards[1])), 4) == expected[15:]


def test_a_data_set_of_several_splits_wants_one_named(folder: Path):
    with pytest.raises(VlmtuneError, match="several splits.*test | train"):
        files_of(str(folder), DataEntry(path="hub:one/set"))
    with pytest.raises(VlmtuneError, match="did you mean 'train'"):
        files_of(str(folder), DataEntry(path="hub:one/set", split="trian"))


def test_a_hub_that_cannot_be_reached_is_a_clear_error(tmp_path: Path):
    with pytest.raises(VlmtuneError, match="cannot be streamed from the hub") as caught:
        open_rows(DataEntry(path="hub:nobody/nothing"), cache_dir=tmp_path, streaming=True)
    assert caught.value.file == "hub:nobody/nothing"


def test_keys_of_data_sets_have_no_effect_on_a_file(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", count=2)
    with pytest.raises(VlmtuneError, match="split has no effect on a file"):
        open_rows(DataEntry(path=str(path), split="train"), cache_dir=tmp_path, streaming=True)


def test_a_stream_is_told_by_sizes_and_times_and_a_hub_set_by_its_revision(folder: Path):
    entries = [DataEntry(path=str(folder / "t*.parquet")), DataEntry(path="hub:a/b", revision="c0")]
    found = stream_identity(entries)
    assert found.pop("hub:a/b") == "revision c0"
    assert sorted(found) == sorted(str(path) for path in folder.glob("*.parquet"))
    path = next(folder.glob("test-*"))
    write_parquet(path, start=90, count=4)
    changed = stream_identity(entries)
    assert [name for name in found if changed[name] != found[name]] == [str(path)]
