"""A set in two by picture."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_duplicates import table
from vlmtune.data.dataset import load_conversations, open_files
from vlmtune.data.tools.duplicates import Digests, overlap
from vlmtune.data.tools.split import Groups, Split, choose_eval, split
from vlmtune.data.types import MediaPolicy
from vlmtune.errors import ErrorGroup, VlmtuneError
from vlmtune.recipe.data_section import DataEntry

ANSWER = {"role": "assistant", "content": "yes"}
NUM_PICTURES = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(NUM_PICTURES):
        PIL.Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def row(name: str, question: str, *pictures: str) -> dict[str, Any]:
    images = [{"type": "image", "image": picture} for picture in pictures]
    content = [*images, {"type": "text", "text": question}]
    return {"id": name, "messages": [{"role": "user", "content": content}, ANSWER]}


def three_each() -> list[dict[str, Any]]:
    return [
        row(f"{n}-{at}", f"Is it {at}?", f"{n}.png") for n in range(NUM_PICTURES) for at in range(3)
    ]


def split_rows(
    folder: Path, rows: Sequence[dict[str, Any]], name: str = "out", **options: Any
) -> Split:
    data = folder / f"{name}.data.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = open_files([DataEntry(path=str(data))], cache_dir=folder / "cache")
    asked = {"eval_fraction": 0.25, "seed": 1} | options
    return split(files, folder / name, **asked)


def ids_of(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_no_picture_is_on_both_sides_and_no_row_is_lost(folder: Path):
    done = split_rows(folder, three_each())
    train, held = (load_conversations([p], media_policy=MediaPolicy(True))[0] for p in done.outputs)
    assert overlap(table(*train), table(*held)).num_pictures == 0
    assert sorted(c.id for c in [*train, *held]) == sorted(r["id"] for r in three_each())
    assert done.num_samples == (45, 15) == (len(train), len(held))
    assert (done.num_groups, done.largest_group, done.eval_fraction) == ((15, 5), 3, 0.25)
    # A wrong variant: without regard to pictures, some are on both sides.
    mixed = [*train, *held]
    random.Random(0).shuffle(mixed)
    wrong = overlap(table(*mixed[:45]), table(*mixed[45:]))
    assert wrong.num_pictures > 0


def test_the_same_picture_under_another_name_stays_together(folder: Path):
    for number in range(NUM_PICTURES):
        content = (folder / f"{number}.png").read_bytes()
        (folder / f"copy-{number}.png").write_bytes(content)
    rows = three_each() + [row(f"c{n}", "And?", f"copy-{n}.png") for n in range(NUM_PICTURES)]
    done = split_rows(folder, rows)
    held = {name.split("-")[0] for name in ids_of(done.outputs[1]) if not name.startswith("c")}
    copies = {name[1:] for name in ids_of(done.outputs[1]) if name.startswith("c")}
    assert held == copies and held


def test_rows_are_joined_through_others(folder: Path):
    """0-1, 1-2, …: each row shares a picture with the next, the first none with the last."""
    chain = [row(f"chain-{n}", "Same?", f"{n}.png", f"{n + 1}.png") for n in range(9)]
    alone = [row(f"alone-{n}", "Same?", f"{n}.png") for n in range(11, 20)]
    done = split_rows(folder, [*chain, *alone], eval_fraction=0.5)
    sides = [{i for i in ids_of(p) if i.startswith("chain")} for p in done.outputs]
    assert sorted(map(len, sides)) == [0, 9]
    assert done.largest_group == 9


def test_rows_without_a_picture_are_kept_together_by_question(folder: Path):
    rows = [row(f"{n}-{at}", f"Question {n}" + " " * at) for n in range(8) for at in range(2)]
    done = split_rows(folder, rows)
    held = [name.split("-")[0] for name in ids_of(done.outputs[1])]
    assert len(held) == 4 and all(held.count(n) == 2 for n in held)


def test_the_order_of_rows_makes_no_difference(folder: Path):
    rows = three_each()
    before = split_rows(folder, rows)
    random.Random(3).shuffle(rows)
    after = split_rows(folder, rows, "shuffled")
    assert set(ids_of(before.outputs[1])) == set(ids_of(after.outputs[1]))
    other = split_rows(folder, rows, "other", seed=2)
    assert set(ids_of(before.outputs[1])) != set(ids_of(other.outputs[1]))


def test_one_picture_in_all_rows_cannot_be_split(folder: Path):
    with pytest.raises(VlmtuneError, match="share their pictures"):
        split_rows(folder, [row(str(n), f"{n}?", "0.png") for n in range(5)])
    assert not (folder / "out" / "eval.jsonl").exists()


def test_where_no_group_fits_the_smallest_is_taken():
    sizes, names = np.array([5, 3, 9]), np.array([1, 2, 3], np.uint64)
    chosen = choose_eval(sizes, names, fraction=0.01, seed=0)
    assert chosen.tolist() == [False, True, False]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_neither_side_is_empty_and_eval_is_not_overfilled(sizes, fraction, seed):
    array = np.array(sizes)
    chosen = choose_eval(
        array, np.arange(len(sizes), dtype=np.uint64), fraction=fraction, seed=seed
    )
    assert 0 < chosen.sum() < len(sizes)
    held = int(array[chosen].sum())
    assert held <= max(round(fraction * int(array.sum())), int(array.min()))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=3), min_size=1, max_size=15))
def test_groups_are_the_connected_rows(rows: list[list[int]]):
    groups = Groups()
    for pictures in rows:
        groups.add(Digests(tuple(pictures), 0, 0, 0))
    of_row, names = groups.resolve()

    # By hand: join rows that share a picture until nothing changes.
    expected = list(range(len(rows)))
    changed = True
    while changed:
        changed = False
        for a in range(len(rows)):
            for b in range(len(rows)):
                if set(rows[a]) & set(rows[b]) and expected[a] != expected[b]:
                    expected[a] = expected[b] = min(expected[a], expected[b])
                    changed = True
    same = [[x == y for y in expected] for x in expected]
    assert [[x == y for y in of_row] for x in of_row] == same
    for group, name in enumerate(names):
        pictures = {p for r, g in zip(rows, of_row) if g == group for p in r}
        assert name == min(pictures)


def test_bad_rows_stop_it_or_are_left_out(folder: Path):
    rows = [*three_each(), row("bad", "What?", "gone.png"), three_each()[0]]
    with pytest.raises(ErrorGroup) as caught:
        split_rows(folder, rows)
    assert "gone.png" in str(caught.value) and ":62:" in str(caught.value)
    assert not (folder / "out" / "eval.jsonl").exists()
    done = split_rows(folder, rows, "again", on_bad_sample="skip")
    assert (done.bad.count, sum(done.num_samples)) == (2, 60)


def test_new_ids_are_those_of_places(folder: Path):
    rows = [row("same", "Which?", f"{name}.png") for name in (1, 2)]
    split_rows(folder, rows, new_ids=True)
    sides = [ids_of(folder / "out" / f"{side}.jsonl") for side in ("train", "eval")]
    assert sorted([*sides[0], *sides[1]]) == ["out.data:1", "out.data:2"]


def test_outputs_are_not_overwritten_unasked(folder: Path):
    split_rows(folder, three_each())
    with pytest.raises(VlmtuneError, match="exists already"):
        split_rows(folder, three_each())
    split_rows(folder, three_each(), overwrite=True)
    assert not list((folder / "out").glob(".writing*"))
