"""The stream's order: permutations, weights, and nothing that depends on what was asked before."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data import order as module
from vlmtune.data.order import Order, chosen_entry, permuted

SIZES = sorted({1, 3, *(2**k + d for k in range(1, 11) for d in (-1, 0, 1))})


@pytest.mark.parametrize("outright", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_permuted(monkeypatch, size: int, outright: bool):
    monkeypatch.setattr(module, "SHUFFLED_OUTRIGHT", size if outright else 0)
    for key in ("a", "b"):
        found = [permuted(place, size=size, key=f"{key}{outright}") for place in range(size)]
        assert sorted(found) == list(range(size))
        assert size < 30 or sum(x == place for place, x in enumerate(found)) < size / 3


@pytest.mark.parametrize("size", [2**16 + 1, 100_003])
def test_a_size_beyond_what_is_shuffled_outright_is_permuted(size: int):
    found = [permuted(place, size=size, key="k") for place in range(size)]
    assert len(set(found)) == size and (min(found), max(found)) == (0, size - 1)
    # No place is near its own: the mean distance of a random permutation is a third of its size.
    distance = sum(abs(x - place) for place, x in enumerate(found)) / size
    assert distance == pytest.approx(size / 3, rel=0.02)
    assert found != [permuted(place, size=size, key="l") for place in range(size)]


def test_a_network_of_one_round_would_leave_half_of_each_place_as_it_is(monkeypatch):
    """The wrong variant of the test above: its distance shows a shuffle that is none."""
    monkeypatch.setattr(module, "_round_keys", lambda key: ())
    size = 2**17
    found = [permuted(place, size=size, key="k") for place in range(size)]
    distance = sum(abs(x - place) for place, x in enumerate(found)) / size
    assert distance != pytest.approx(size / 3, rel=0.02)


def epoch_of(order: Order, number: int) -> Counter[int]:
    per = order.num_per_epoch
    return Counter(order.row_at(place) for place in range(number * per, (number + 1) * per))


@pytest.mark.parametrize("outright", [True, False])
@pytest.mark.parametrize("weight", [1.0, 2.0, 3.0])
def test_a_whole_weight_shows_each_row_so_often_in_every_epoch(
    monkeypatch, weight: float, outright: bool
):
    monkeypatch.setattr(module, "SHUFFLED_OUTRIGHT", 1 << 16 if outright else 0)
    order = Order(5, (7, 20), (weight, 1.0))
    for epoch in range(4):
        expected = dict.fromkeys(range(7), int(weight)) | dict.fromkeys(range(7, 27), 1)
        assert epoch_of(order, epoch) == expected


@pytest.mark.parametrize(("weight", "epochs"), [(0.5, 2), (1 / 3, 3), (0.25, 4)])
def test_a_part_of_a_weight_shows_each_row_once_in_so_many_epochs(weight: float, epochs: int):
    order = Order(5, (12, 5), (weight, 1.0))
    for first in range(0, 3 * epochs, epochs):
        seen = sum((epoch_of(order, first + n) for n in range(epochs)), Counter())
        assert {row: seen[row] for row in range(12)} == dict.fromkeys(range(12), 1)
        assert {row: seen[row] for row in range(12, 17)} == dict.fromkeys(range(12, 17), epochs)
    assert set(epoch_of(order, 0)) != set(epoch_of(order, 1))


def test_a_weight_of_one_and_a_half_shows_each_row_three_times_in_two_epochs():
    order = Order(5, (10,), (1.5,))
    assert epoch_of(order, 0) + epoch_of(order, 1) == dict.fromkeys(range(10), 3)


entries = st.tuples(st.integers(1, 9), st.sampled_from([0.5, 1.0, 2.0]))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=4
    ),
    st.lists(st.integers(0, 200), min_size=1, max_size=20),
)
def test_what_stands_at_a_place_does_not_depend_on_what_was_asked_before(seed, given, places):
    counts, weights = zip(*given)
    if sum(round(n * w) for n, w in given) == 0:
        return
    alone = [Order(seed, counts, weights).row_at(place) for place in places]
    order = Order(seed, counts, weights)
    assert [order.row_at(place) for place in reversed(places)] == alone[::-1]


def test_memory_does_not_grow_with_the_rows():
    def peak(count: int) -> int:
        order = Order(0, (count, count), (1.0, 0.5))
        tracemalloc.start()
        for place in range(0, count, count // 50):
            order.row_at(place)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(10**5)
    assert peak(10**9) < 100_000
    # The wrong variant: a shuffled list of a hundred thousand places takes more.
    tracemalloc.start()
    list(range(10**5))
    assert tracemalloc.get_traced_memory()[1] > 100_000
    tracemalloc.stop()


def test_entries_are_chosen_by_their_weights_and_by_nothing_else():
    def chosen(seed: int, weights: list[float]) -> list[int]:
        return [chosen_entry(place, seed=seed, weights=weights) for place in range(20_000)]

    found = Counter(chosen(3, [3.0, 1.0, 0.5]))
    for entry, share in enumerate((3 / 4.5, 1 / 4.5, 0.5 / 4.5)):
        assert found[entry] / 20_000 == pytest.approx(share, abs=0.012)  # over 3 sigma
    assert chosen(3, [3.0, 1.0]) == chosen(3, [6.0, 2.0])
    assert chosen(3, [3.0, 1.0]) != chosen(4, [3.0, 1.0])
    assert set(chosen(3, [2.5])) == {0}
