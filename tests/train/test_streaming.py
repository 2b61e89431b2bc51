"""Stopped and resumed feeds see what an uninterrupted one sees: by number and as a stream, for any
number of processes and workers; and whole runs end in the same adapter, bit for bit."""

from __future__ import annotations

import gzip
import json
import pickle
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.test_processes import train_in_two
from tests.train.test_resume import start_process, wait_for_step
from tests.train.training import METHODS, adapter_of, metrics_of, train_once, write_recipe
from vlmtune.data import dataset as source
from vlmtune.data.batches import BatchLayout, Budget
from vlmtune.data.dataset import open_conversations
from vlmtune.data.order import Order
from vlmtune.data.stream import Stream, StreamCursor, open_stream
from vlmtune.data.types import IGNORED, Conversation, Sample
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.recipe.data_section import DataEntry
from vlmtune.train.checkpoint import complete_checkpoints, read_state
from vlmtune.train.feed import (
    FeedSettings,
    StepBatch,
    StepBuilder,
    StepDataset,
    steps_from,
    stream_steps,
)
from vlmtune.train.probe import sample_evenly
from vlmtune.train.run_folder import SkipLog


class ThreeTokens:
    """Encodes every conversation as three tokens, for feeds whose samples' ids are what counts;
    those with an id in `refused` cannot be encoded."""

    def __init__(self, refused: Sequence[str] = ()) -> None:
        self.refused = tuple(refused)

    def encode(self, conversation: Conversation) -> Sample:
        if conversation.id in self.refused:
            raise SampleError("refused", file=conversation.source.file, line=1)
        ids = torch.tensor([1, 2, 3])
        targets = torch.tensor([2, 3, IGNORED])
        return Sample(conversation.id, conversation.source, ids, targets)


def builder(*, batch_size: int, rank: int = 0, world_size: int = 1, **others) -> StepBuilder:
    encoder = ThreeTokens(others.pop("refused", ()))
    plan = FeedSettings(
        batch_size=batch_size,
        # A micro-batch for each sample, in the order of the step.
        layout=BatchLayout(Budget(1), 0, "flat", packs=False),
        skip_bad_samples=others.pop("skip", False),
        drop_over_length=False,
        rank=rank,
        world_size=world_size,
    )
    return StepBuilder(encoder, plan)


def write_rows(path: Path, count: int) -> DataEntry:
    rows = [
        {
            "id": f"{path.name.split('.')[0]}-{number}",
            "messages": [
                {"role": "user", "content": "Say it."},
                {"role": "assistant", "content": f"number {number}"},
            ],
        }
        for number in range(count)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)
    return DataEntry(path=str(path))


@pytest.fixture(scope="module")
def entries(tmp_path_factory) -> list[DataEntry]:
    folder = tmp_path_factory.mktemp("rows")
    one = write_rows(folder / "one.jsonl", 23)
    return [
        one.model_copy(update={"weight": 2.0}),
        write_rows(folder / "two.jsonl.gz", 9),
    ]


def ids_of(data: StepBatch) -> list[str]:
    return [name for batch in data.micro_batches for name in batch.sample_ids if name]


def global_ids(steps: Sequence[Iterator[StepBatch]]) -> list[list[str]]:
    """Of each step, the samples of all processes, sorted: who gets which is decided by work."""
    return [
        sorted(name for part in parts for name in ids_of(part))
        for parts in zip(*steps, strict=True)
    ]


def streamed(
    stream: Stream,
    first: int,
    last: int,
    *,
    batch_size: int,
    processes: int,
    cursor=None,
    workers=0,
) -> list[list[str]]:
    return global_ids(
        [
            stream_steps(
                stream,
                builder(batch_size=batch_size, rank=rank, world_size=processes),
                first,
                last,
                cursor=cursor,
                num_workers=workers,
            )
            for rank in range(processes)
        ]
    )


def cursor_after(stream: Stream, step: int, *, batch_size: int) -> StreamCursor | None:
    """As the checkpoint of `step` keeps it."""
    steps = stream_steps(
        stream, builder(batch_size=batch_size), 1, step, cursor=None, num_workers=0
    )
    kept = [data.cursor for data in steps]
    if not kept:
        return None
    return StreamCursor.from_dict(json.loads(json.dumps(kept[-1].as_dict())))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    block_rows=st.integers(1, 30),
    batch_size=st.integers(2, 7),
    stop=st.integers(0, 12),
    processes=st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]),
)
def test_a_stopped_and_resumed_stream_sees_the_same_remaining_samples(
    entries, seed: int, block_rows: int, batch_size: int, stop: int, processes: tuple[int, int]
):
    folder = Path(entries[0].path).parent
    stream = open_stream(entries, seed=seed, block_rows=block_rows, cache_dir=folder)
    before, after = processes
    whole = streamed(stream, 1, stop + 8, batch_size=batch_size, processes=before)
    assert all(len(step) == batch_size for step in whole)
    cursor = cursor_after(stream, stop, batch_size=batch_size)
    kept = pickle.loads(pickle.dumps(stream))
    resumed = streamed(
        kept, stop + 1, stop + 8, batch_size=batch_size, processes=after, cursor=cursor
    )
    assert resumed == whole[stop:]


def test_a_resume_that_ignores_the_cursor_or_takes_another_epochs_sees_others(entries):
    """The wrong variants of the test above."""
    stream = open_stream(entries, seed=3, block_rows=10, cache_dir=Path(entries[0].path).parent)
    whole = streamed(stream, 1, 20, batch_size=4, processes=1)
    cursor = cursor_after(stream, 12, batch_size=4)
    assert cursor is not None
    assert streamed(stream, 13, 20, batch_size=4, processes=1, cursor=cursor) == whole[12:]
    assert streamed(stream, 13, 20, batch_size=4, processes=1, cursor=None) != whole[12:]
    first = replace(cursor.entries[0], epoch=cursor.entries[0].epoch + 1)
    other = replace(cursor, entries=(first, *cursor.entries[1:]))
    assert streamed(stream, 13, 20, batch_size=4, processes=1, cursor=other) != whole[12:]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    batch_size=st.integers(2, 7),
    stop=st.integers(0, 12),
    processes=st.integers(1, 2),
    scanned=st.booleans(),
)
def test_a_stopped_and_resumed_feed_by_number_sees_the_same_remaining_samples(
    entries, seed: int, batch_size: int, stop: int, processes: int, scanned: bool
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "SCANNED_OUTRIGHT", 100 if scanned else 0)
        data, _ = open_conversations(entries[:1], on_bad_sample="error")

    def seen(first: int, seed: int) -> list[list[str]]:
        order = Order(seed, *data.counts_and_weights())
        steps = []
        for rank in range(processes):
            own = builder(batch_size=batch_size, rank=rank, world_size=processes)
            dataset = StepDataset(data, own, order=order, epochs=None)
            steps.append(steps_from(dataset, first, stop + 12, num_workers=0))
        return global_ids(steps)

    whole = seen(1, seed)
    assert seen(stop + 1, seed) == whole[stop:]
    assert seen(stop + 1, seed + 1) != whole[stop:]  # the wrong variant: another seed


def test_one_and_two_processes_see_the_same_steps_each_half_of_them(entries):
    stream = open_stream(entries, seed=0, block_rows=10, cache_dir=Path(entries[0].path).parent)
    one = streamed(stream, 1, 10, batch_size=5, processes=1)
    assert streamed(stream, 1, 10, batch_size=5, processes=2) == one
    halves = [
        [
            ids_of(data)
            for data in stream_steps(
                stream,
                builder(batch_size=5, rank=rank, world_size=2),
                1,
                10,
                cursor=None,
                num_workers=0,
            )
        ]
        for rank in (0, 1)
    ]
    sizes = [sorted(map(len, shares)) for shares in zip(*halves, strict=True)]
    assert sizes == [[2, 3]] * 10


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_steps(entries, workers: int):
    stream = open_stream(entries, seed=0, block_rows=10, cache_dir=Path(entries[0].path).parent)
    alone = streamed(stream, 1, 11, batch_size=4, processes=1)
    assert streamed(stream, 1, 11, batch_size=4, processes=1, workers=workers) == alone
    cursor = cursor_after(stream, 5, batch_size=4)
    resumed = streamed(stream, 6, 11, batch_size=4, processes=2, cursor=cursor, workers=workers)
    assert resumed == alone[5:]
    data, _ = open_conversations(entries[:1], on_bad_sample="error")
    dataset = StepDataset(data, builder(batch_size=4), order=Order.uniform(0, 23), epochs=1.0)
    steps = [ids_of(item) for item in steps_from(dataset, 1, 6, num_workers=workers)]
    assert steps == [ids_of(item) for item in steps_from(dataset, 1, 6, num_workers=0)]
    assert sorted(sum(steps, [])) == sorted(f"one-{n}" for n in range(23))


def broken_rows(folder: Path) -> DataEntry:
    entry = write_rows(folder / "rows.jsonl", 20)
    lines = Path(entry.path).read_text().splitlines()
    lines[4], lines[11] = '{"messages": 7}', "{broken"
    Path(entry.path).write_text("\n".join(lines) + "\n")
    return entry


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_left_out_or_stop_the_run_at_their_line(
    tmp_path: Path, monkeypatch, is_stream: bool, workers: int
):
    monkeypatch.setattr(source, "SCANNED_OUTRIGHT", 0)
    entry = broken_rows(tmp_path)

    def steps(skip: bool) -> Iterator[StepBatch]:
        made = builder(batch_size=5, skip=skip, refused=["rows-7"])
        if is_stream:
            stream = open_stream([entry], seed=0, block_rows=100, cache_dir=tmp_path)
            return stream_steps(stream, made, 1, 4, cursor=None, num_workers=workers)
        data, skipped = open_conversations([entry], on_bad_sample="error")
        assert skipped == []
        dataset = StepDataset(data, made, order=Order.uniform(0, 20), epochs=None)
        return steps_from(dataset, 1, 4, num_workers=workers)

    found = list(steps(skip=True))
    left_out = {x.id: (x.line, x.is_bad) for data in found for x in data.left_out}
    assert left_out == {"rows:5": (5, True), "rows:12": (12, True), "rows-7": (8, True)}
    assert sum(len(ids_of(data)) for data in found) == 17
    assert {data.num_step_samples for data in found} == {5}
    with pytest.raises(SampleError) as caught:
        list(steps(skip=False))
    assert caught.value.file == entry.path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_off_stops_the_run_even_where_bad_samples_are_skipped(
    tmp_path: Path, workers: int
):
    entry = write_rows(tmp_path / "rows.jsonl.gz", 5000)
    path = Path(entry.path)
    path.write_bytes(path.read_bytes()[:-2000])
    stream = open_stream([entry], seed=0, block_rows=50, cache_dir=tmp_path)
    steps = stream_steps(
        stream, builder(batch_size=50, skip=True), 1, 100, cursor=None, num_workers=workers
    )
    with pytest.raises(VlmtuneError, match="broken or cut off"):
        for _ in steps:  # not kept: each tensor from a worker holds a file open
            pass


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_row_without_an_answer_to_learn_is_left_out(tmp_path: Path, monkeypatch, is_stream: bool):
    monkeypatch.setattr(source, "SCANNED_OUTRIGHT", 0)
    entry = write_rows(tmp_path / "rows.jsonl", 3)
    question = {"messages": [{"role": "user", "content": "Well?"}], "answers": ["so"]}
    with Path(entry.path).open("a") as file:
        file.write(json.dumps(question) + "\n")
    made = builder(batch_size=4, skip=True)
    if is_stream:
        stream = open_stream([entry], seed=0, block_rows=100, cache_dir=tmp_path)
        (data,) = stream_steps(stream, made, 1, 1, cursor=None, num_workers=0)
    else:
        rows, _ = open_conversations([entry], on_bad_sample="error")
        data = StepDataset(rows, made, order=Order.uniform(0, 4), epochs=None)[1]
    (left_out,) = data.left_out
    assert (left_out.id, left_out.line) == ("rows:4", 4)
    assert "no assistant turn" in left_out.reason and len(ids_of(data)) == 3


def test_the_epoch_of_a_stream_is_that_of_its_first_entry(entries):
    stream = open_stream(entries[:1], seed=0, block_rows=10, cache_dir=Path("unused"))
    steps = stream_steps(stream, builder(batch_size=8), 1, 9, cursor=None, num_workers=0)
    # 23 rows: the third step ends one row into the second pass.
    assert [data.epoch for data in steps] == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_pictures_are_looked_for_all_over_a_large_set_and_bad_rows_passed_over(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(source, "SCANNED_OUTRIGHT", 0)
    entries = [broken_rows(tmp_path), write_rows(tmp_path / "later.jsonl", 2500)]
    data, _ = open_conversations(entries, on_bad_sample="error")
    problems: list[SampleError] = []
    found = [conversation.id for conversation in sample_evenly(data, problems)]
    assert {error.line for error in problems} <= {5, 12}
    assert 800 < len(found) <= 1000 and found[-1] > "later-24"
    stream = open_stream(entries, seed=0, block_rows=100, cache_dir=tmp_path)
    found = [conversation.id for conversation in sample_evenly(stream, problems)]
    assert 800 < len(found) < 1000  # one in ten of the first entry's cannot be read
    assert {name.split("-")[0] for name in found} == {"rows", "later"}
    assert {error.line for error in problems} == {5, 12}


def test_a_streams_bad_rows_count_each_time_they_come(tmp_path: Path):
    entry = broken_rows(tmp_path)
    stream = open_stream([entry], seed=0, block_rows=100, cache_dir=tmp_path)
    skip_log = SkipLog(
        tmp_path / "skipped.jsonl", num_samples=200, max_bad_fraction=0.05, counts_repeats=True
    )
    made = builder(batch_size=10, skip=True)
    with pytest.raises(VlmtuneError, match="too many bad samples: 1[12] of 200"):
        for data in stream_steps(stream, made, 1, 20, cursor=None, num_workers=0):
            skip_log.add(data.left_out, write=True)
            rest = SkipLog(
                tmp_path / "again", num_samples=200, max_bad_fraction=0.05, counts_repeats=True
            )
            rest.restore(skip_log.as_list(), num_bad=skip_log.num_bad)
            assert (rest.num_bad, rest.num_left_out) == (skip_log.num_bad, skip_log.num_left_out)
    assert skip_log.num_left_out == 2 == len((tmp_path / "skipped.jsonl").read_text().splitlines())


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_vlm: Path, sample_data: Path):
    """Streams of two entries, one compressed, that go round more than once."""
    lines = (sample_data / "train.jsonl").read_text().splitlines()
    rows = tmp_path / "data"
    rows.mkdir()
    (rows / "one.jsonl").write_text("\n".join(lines[:11]) + "\n")
    (rows / "two.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[11:18]).encode()))
    names = ("one.jsonl", "two.jsonl.gz")
    files = [{"path": str(rows / name), "image_dir": str(sample_data)} for name in names]

    def make(name: str, **keys: object) -> Path:
        streaming = {"data__streaming": True, "data__shuffle_buffer": 4, "dropout": 0.1}
        keys = {"data__train": files, "rank": 4} | streaming | keys
        return write_recipe(tmp_path / name, tiny_vlm=tiny_vlm, data=rows, **keys)

    return make


# Without workers before the kill: no more than the tests above hold.
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_killed_and_resumed_streaming_run_equals_an_uninterrupted_one(make_recipe, workers: int):
    whole, killed = make_recipe("whole"), make_recipe("killed", data__num_workers=workers)
    train_once(whole)
    process = start_process(killed)
    run = killed.parent / "run"
    wait_for_step(run, 5, process)  # saved after 3; the next save comes after 6
    process.send_signal(signal.SIGKILL)
    process.wait()
    (saved,) = complete_checkpoints(run / "checkpoints")[-1:]
    assert read_state(saved).cursor["place"] == 4 * read_state(saved).step
    train_once(killed, "data.num_workers=0", resume="auto")
    expected, resumed = adapter_of(whole.parent / "run"), adapter_of(run)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)
    losses = [m["loss"] for m in metrics_of(run)]
    assert losses == [m["loss"] for m in metrics_of(whole.parent / "run")]
    assert metrics_of(run)[-1]["epoch"] >= 2


def test_a_run_that_lost_its_cursor_ends_elsewhere(make_recipe):
    recipe = make_recipe("run", train__keep_checkpoints=10)
    train_once(recipe)
    run = recipe.parent / "run"
    expected = adapter_of(run)
    (saved,) = [p for p in complete_checkpoints(run / "checkpoints") if p.name[-1] == "6"]
    state = json.loads((saved / "state.json").read_text())
    for entry in state["cursor"]["entries"]:
        entry.update(dict.fromkeys(entry, 0))
    (saved / "state.json").write_text(json.dumps(state))
    train_once(recipe, resume=str(saved))
    assert any(not torch.equal(expected[k], v) for k, v in adapter_of(run).items())


def test_two_processes_stream_what_one_does(make_recipe):
    keys = {**METHODS["lora"], "dropout": 0.0, "train__max_steps": 6}
    one, two = make_recipe("one", **keys), make_recipe("two", **keys)
    train_once(one)
    train_in_two(two)
    expected, got = metrics_of(one.parent / "run"), metrics_of(two.parent / "run")
    assert [m["step"] for m in got] == [m["step"] for m in expected]
    for a, b in zip(expected, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["supervised_tokens"] == a["supervised_tokens"]


def test_a_contrastive_run_streams_and_resumes(make_recipe):
    keys = {"objective": "contrastive", "train__max_steps": 6, "train__keep_checkpoints": 10}
    recipe = make_recipe("run", **keys)
    train_once(recipe)
    run = recipe.parent / "run"
    expected = adapter_of(run)
    (saved,) = [p for p in complete_checkpoints(run / "checkpoints") if p.name[-1] == "3"]
    train_once(recipe, resume=str(saved))
    assert all(torch.equal(expected[k], v) for k, v in adapter_of(run).items())


def test_a_streams_file_that_changed_is_not_resumed(make_recipe):
    recipe = make_recipe("run", train__max_steps=3)
    train_once(recipe)
    path = recipe.parent.parent / "data" / "one.jsonl"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(VlmtuneError, match=r"cannot resume: content of .*one\.jsonl changed"):
        train_once(recipe, resume="auto")
