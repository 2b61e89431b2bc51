"""A stream of rows read from front to back: every row, shuffled, mixed, and from any place on."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.sources.base import RawRow
from vlmtune.data.sources.jsonl import open_jsonl
from vlmtune.data.stream import (
    OpenStream,
    ShuffledReader,
    Stream,
    StreamCursor,
    StreamPosition,
    open_stream,
)
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.recipe.data_section import DataEntry


class Numbers:
    """A shard of `size` rows in memory, which counts what is read and parsed."""

    def __init__(self, name: str, size: int) -> None:
        self.file, self.base_dir, self.size = name, Path("."), size
        self.starts: list[int] = []
        self.num_read = 0

    def iter_from(self, start: int) -> Iterator[RawRow]:
        self.starts.append(start)
        for number in range(start, self.size):
            self.num_read += 1
            yield RawRow(number, number + 1, self.read)

    def read(self):
        raise AssertionError("parsed")


def reader(sizes, *, block_rows, seed=1, cursor=None) -> ShuffledReader:
    shards = [Numbers(str(n), size) for n, size in enumerate(sizes)]
    return ShuffledReader(shards, seed=seed, entry=0, block_rows=block_rows, cursor=cursor)


def taken(source: ShuffledReader, count: int) -> list[tuple[str, int]]:
    rows = [source.take() for _ in range(count)]
    return [(str(row.shard), row.row.number) for row in rows]


some_shards = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@settings(max_examples=80, deadline=None)
@given(some_shards, st.integers(1, 12), st.integers(0, 99))
def test_each_epoch_holds_every_row_once(sizes, block_rows, seed):
    every = {(str(n), row) for n, size in enumerate(sizes) for row in range(size)}
    source = reader(sizes, block_rows=block_rows, seed=seed)
    for epoch in range(3):
        found = taken(source, len(every))
        assert len(found) == len(set(found)) and set(found) == every
        assert source.cursor.epoch == epoch


@settings(max_examples=120, deadline=None)
@given(some_shards, st.integers(1, 12), st.integers(0, 99), st.integers(0, 60))
def test_a_reader_goes_on_from_its_cursor(sizes, block_rows, seed, stop):
    whole = taken(reader(sizes, block_rows=block_rows, seed=seed), stop + 40)
    stopped = reader(sizes, block_rows=block_rows, seed=seed)
    assert taken(stopped, stop) == whole[:stop]
    resumed = reader(sizes, block_rows=block_rows, seed=seed, cursor=stopped.cursor)
    assert taken(resumed, 40) == whole[stop:]


def stopped_at(sizes, *, block_rows, stop) -> tuple[StreamPosition, list[tuple[str, int]]]:
    """The cursor after `stop` rows, and the 20 that come then."""
    source = reader(sizes, block_rows=block_rows)
    taken(source, stop)
    return source.cursor, taken(source, 20)


@pytest.mark.parametrize("field", ["epoch", "block", "shard", "row", "taken"])
def test_a_cursor_that_lost_a_field_leads_elsewhere(field: str):
    # In the second epoch, in its third block, which starts within its second shard.
    cursor, expected = stopped_at([20, 20, 20], block_rows=13, stop=60 + 30)
    assert (cursor.epoch, cursor.block, cursor.shard, cursor.row, cursor.taken) == (1, 2, 1, 6, 4)
    same = reader([20, 20, 20], block_rows=13, cursor=cursor)
    assert taken(same, 20) == expected
    lost = replace(cursor, **{field: 0})
    assert taken(reader([20, 20, 20], block_rows=13, cursor=lost), 20) != expected


def test_epochs_blocks_and_seeds_have_orders_of_their_own():
    source = reader([64], block_rows=32)
    blocks = [[row for _, row in taken(source, 32)] for _ in range(4)]
    orders = [tuple(row % 32 for row in block) for block in blocks]
    assert len(set(orders)) == 4
    assert [sorted(block)[0] for block in blocks] == [0, 32, 0, 32]
    other = reader([64], block_rows=32, seed=2)
    assert [row for _, row in taken(other, 32)] != blocks[0]


def test_a_resume_reads_one_block_again_and_parses_nothing():
    cursor, _ = stopped_at([1000], block_rows=100, stop=750)
    source = reader([1000], block_rows=100, cursor=cursor)
    (shard,) = source._shards
    taken(source, 50)
    assert (shard.starts, shard.num_read) == ([700], 100)


def test_no_more_than_a_block_is_held():
    source = reader([1000], block_rows=100)
    (shard,) = source._shards
    for number in range(1, 1001):
        source.take()
        assert shard.num_read - number < 100


def test_data_without_rows_is_an_error_and_no_endless_search():
    with pytest.raises(VlmtuneError, match="no sample"):
        reader([0, 0], block_rows=4).take()


def test_fewer_rows_than_before_are_noticed():
    cursor, _ = stopped_at([40], block_rows=20, stop=38)
    with pytest.raises(VlmtuneError, match="fewer rows than when the run stopped"):
        reader([30], block_rows=20, cursor=cursor).take()


def write_rows(path: Path, count: int, *, name: str | None = None) -> Path:
    lines = [
        json.dumps(
            {
                "id": f"{name or path.name}-{number}",
                "messages": [
                    {"role": "user", "content": "Say it."},
                    {"role": "assistant", "content": f"number {number}"},
                ],
            }
        )
        for number in range(count)
    ]
    text = "\n".join(lines) + "\n"
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def stream_of(*entries: DataEntry, seed: int = 1, block_rows: int = 5, folder: Path) -> Stream:
    return open_stream(entries, seed=seed, block_rows=block_rows, cache_dir=folder / "cache")


def ids(source: OpenStream, count: int) -> list[str]:
    return [source.take().conversation().id for _ in range(count)]


def test_entries_are_mixed_by_weight_and_each_goes_round(tmp_path: Path):
    often = DataEntry(path=str(write_rows(tmp_path / "often.jsonl", 6)), weight=3.0)
    rarely = DataEntry(path=str(write_rows(tmp_path / "rarely.jsonl.gz", 50)))
    found = ids(OpenStream(stream_of(often, rarely, folder=tmp_path)), 400)
    by_entry = Counter(name.split(".")[0] for name in found)
    assert by_entry["often"] / 400 == pytest.approx(0.75, abs=0.07)
    rounds = Counter(name for name in found if name.startswith("often"))
    assert len(rounds) == 6 and max(rounds.values()) - min(rounds.values()) <= 1


@settings(max_examples=30, deadline=None)
@given(stop=st.integers(0, 70), seed=st.integers(0, 9))
def test_a_mixed_stream_goes_on_from_its_cursor(tmp_path_factory, stop: int, seed: int):
    folder = tmp_path_factory.mktemp("stream")
    entries = [
        DataEntry(path=str(write_rows(folder / "one.jsonl", 11)), weight=2.0),
        DataEntry(path=str(write_rows(folder / "two.jsonl.gz", 7))),
    ]
    stream = stream_of(*entries, seed=seed, folder=folder)
    whole = ids(OpenStream(stream), stop + 30)
    stopped = OpenStream(stream)
    ids(stopped, stop)
    kept = json.loads(json.dumps(stopped.cursor.as_dict()))
    resumed = OpenStream(pickle.loads(pickle.dumps(stream)), StreamCursor.from_dict(kept))
    assert ids(resumed, 30) == whole[stop:]


def test_shards_of_a_pattern_are_one_entry_in_another_order_each_epoch(tmp_path: Path):
    for number in range(8):
        write_rows(tmp_path / f"part-{number:03d}.jsonl", 4)
    entry = DataEntry(path=str(tmp_path / "part-{000..007}.jsonl"))
    source = OpenStream(stream_of(entry, block_rows=1, folder=tmp_path))
    epochs = [[name.split(".")[0] for name in ids(source, 32)] for _ in range(3)]
    assert all(epoch.count("part-003") == 4 for epoch in epochs)
    orders = {tuple(dict.fromkeys(epoch)) for epoch in epochs}
    assert len(orders) == 3 and all(len(order) == 8 for order in orders)


def test_every_row_is_given_once_in_the_order_of_the_files(tmp_path: Path):
    paths = [write_rows(tmp_path / name, 3) for name in ("b.jsonl", "a.jsonl.gz")]
    stream = stream_of(*(DataEntry(path=str(p)) for p in paths), folder=tmp_path)
    found = [row.conversation().id for row in stream.every_row()]
    assert found == [f"{p.name}-{n}" for p in paths for n in range(3)]


def test_a_bad_row_raises_with_its_line_when_it_is_parsed_and_not_before(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", 4)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", '{"messages": 7}', "{broken", *lines[2:]]) + "\n")
    stream = stream_of(DataEntry(path=str(path)), folder=tmp_path)
    opened = OpenStream(stream)
    assert {opened.take().raw.line for _ in range(5)} == {1, 3, 4, 5, 6}
    rows = list(stream.every_row())
    assert [row.source.line for row in rows] == [1, 3, 4, 5, 6]
    for row in rows[1:3]:
        with pytest.raises(SampleError) as caught:
            row.conversation()
        assert (caught.value.file, caught.value.line) == (str(path), row.raw.line)
        assert row.id == f"rows:{row.raw.line}"


def test_rows_without_an_id_have_the_same_names_as_by_number(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(f"\n{json.dumps({'messages': turns})}\n")
    (row,) = stream_of(DataEntry(path=str(path)), folder=tmp_path).every_row()
    assert (row.id, row.conversation().id) == ("rows:2", "rows:2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "broken or cut off"),
        (lambda content: content[:-12] + b"x" * 12, "broken or cut off"),
        (lambda content: b"no gzip" + content, "broken or cut off"),
    ],
)
def test_a_broken_compressed_file_is_named(tmp_path: Path, damage, message: str):
    path = write_rows(tmp_path / "rows.jsonl.gz", 2000)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VlmtuneError, match=message) as caught:
        list(open_jsonl(path, cache_dir=tmp_path, streaming=True).iter_from(0))
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["none.jsonl.gz"], "no such data file"),
        (["none-*.jsonl"], "no file matches"),
        (["empty.jsonl"], "no sample"),
        (["a.jsonl", "a.jsonl"], "listed twice"),
        (["a.jsonl", "link.jsonl"], "listed twice"),
    ],
)
def test_data_that_cannot_be_streamed_is_named(tmp_path: Path, paths: list[str], message: str):
    write_rows(tmp_path / "a.jsonl", 2)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    entries = [DataEntry(path=str(tmp_path / path)) for path in paths]
    with pytest.raises(VlmtuneError, match=message):
        stream_of(*entries, folder=tmp_path)
