"""Every plan covers every sample, keeps the budget and is the same for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.data.batches import (
    Budget,
    balanced_shares,
    num_steps,
    plan_packs,
    plan_padded,
    share_mark,
    step_samples,
)
from vlmtune.data.order import Order


def epoch_order(seed, epoch, num_samples):
    order = Order.uniform(seed, num_samples)
    return [order.row_at(epoch * num_samples + place) for place in range(num_samples)]


few = settings(max_examples=60, deadline=None)
counts = st.integers(1, 40)


@few
@given(st.integers(0, 2**31), st.integers(0, 5), counts)
def test_an_epoch_is_a_permutation(seed, epoch, num_samples):
    assert sorted(epoch_order(seed, epoch, num_samples)) == list(range(num_samples))


def test_the_order_depends_on_seed_and_epoch_and_is_fixed_for_all_time():
    assert epoch_order(0, 0, 50) != epoch_order(0, 1, 50)
    assert epoch_order(0, 0, 50) != epoch_order(1, 0, 50)
    assert epoch_order(1, 10, 50) != epoch_order(11, 0, 50)
    assert epoch_order(42, 0, 8) == [6, 5, 3, 2, 4, 1, 0, 7]


@few
@given(st.integers(0, 99), counts, counts, st.sampled_from([0.5, 1, 1.5, 2, 3]))
def test_steps_cover_each_epoch_exactly_once(seed, num_samples, batch_size, epochs):
    steps = num_steps(epochs, num_samples, batch_size)
    stream = [
        index
        for step in range(1, steps + 1)
        for index in step_samples(
            step, order=Order.uniform(seed, num_samples), batch_size=batch_size, epochs=epochs
        )
    ]
    whole, rest = divmod(len(stream), num_samples)
    for epoch in range(whole):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert part == epoch_order(seed, epoch, num_samples)
    assert max(Counter(stream[whole * num_samples :]).values(), default=1) == 1
    assert abs(len(stream) - epochs * num_samples) < 1
    last = step_samples(
        steps + 1, order=Order.uniform(seed, num_samples), batch_size=batch_size, epochs=epochs
    )
    assert last == []


def test_without_epochs_every_step_is_full_and_a_step_may_cross_epochs():
    first = step_samples(1, order=Order.uniform(3, 5), batch_size=4)
    second = step_samples(2, order=Order.uniform(3, 5), batch_size=4)
    assert len(first) == len(second) == 4
    assert sorted(first + second[:1]) == list(range(5))
    assert second[1:] == epoch_order(3, 1, 5)[:3]


@pytest.mark.parametrize(
    ("epochs", "num_samples", "batch_size", "steps"),
    [(3, 100, 16, 19), (1, 32, 16, 2), (0.1, 30, 1, 3), (1, 1, 16, 1), (0.001, 10, 4, 1)],
)
def test_num_steps_by_hand(epochs, num_samples, batch_size, steps):
    assert num_steps(epochs, num_samples, batch_size) == steps


samples_of_a_step = st.lists(
    st.integers(1, 60).flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(1, tokens))),
    max_size=40,
)
budgets = st.builds(Budget, st.integers(1, 200), st.none() | st.integers(1, 100))


@few
@given(samples_of_a_step, budgets, st.booleans())
def test_micro_batches_cover_each_position_once_within_both_budgets(samples, budget, packs):
    lengths, supervised = [n for n, _ in samples], [s for _, s in samples]
    groups = (plan_packs if packs else plan_padded)(lengths, supervised, budget=budget)
    assert sorted(position for group in groups for position in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[position] for position in group)
        tokens = sum(lengths[at] for at in group) if packs else len(group) * longest
        fits = budget.takes(tokens, sum(supervised[at] for at in group))
        assert fits or len(group) == 1


def test_padded_micro_batches_by_hand():
    def plan(lengths, tokens, *, supervised=None):
        of_each = [1] * len(lengths)
        return plan_padded(lengths, of_each, budget=Budget(tokens, supervised))

    assert plan([3, 10, 4, 4, 1], 12) == [[1], [2, 3, 0], [4]]
    assert plan([5, 5, 5], 4) == [[0], [1], [2]]
    assert plan([], 4) == []
    assert plan([3, 10, 4, 4, 1], 12, supervised=2) == [[1], [2, 3], [0, 4]]
    # The wrong variant counts tokens without padding: 10 + 1 would have fitted into 12.
    assert [1, 4] not in plan([3, 10, 4, 4, 1], 12)


def test_packs_by_hand():
    def plan(lengths, tokens, *, supervised=None):
        of_each = [1] * len(lengths)
        return plan_packs(lengths, of_each, budget=Budget(tokens, supervised))

    assert plan([3, 10, 4, 4, 1], 12) == [[0, 2, 3], [1, 4]]
    # Two packs are needed: filled up they would be 11 and 6, spread evenly they are 9 and 8.
    assert plan([6, 5, 3, 3], 11) == [[0, 3], [1, 2]]
    assert plan([6, 5, 3, 3], 20, supervised=1) == [[0], [1], [2], [3]]
    assert plan([50, 2, 2], 4) == [[0], [1, 2]]
    assert plan([], 4) == []


@few
@given(st.lists(st.floats(0.1, 1000), max_size=40), st.integers(1, 9))
def test_shares_of_about_the_same_work_partition_the_step(work, world_size):
    shares = balanced_shares(work, world_size)
    assert sorted(position for share in shares for position in share) == list(range(len(work)))
    assert len(shares) == world_size
    assert len(work) < world_size or all(shares)
    if work:
        heaviest = max(sum(work[at] for at in share) for share in shares)
        # The bound that holds for any such split: the mean, and one sample more.
        assert heaviest <= sum(work) / world_size + max(work) + 1e-6


@few
@given(st.lists(st.floats(0.1, 1000), min_size=2, max_size=40), st.integers(2, 5), st.data())
def test_marks_tell_shares_of_processes_that_do_not_agree(work, world_size, data):
    """Process 0 cannot read one of the samples, and takes it for no work."""
    whole = share_mark(range(len(work)))
    agreed = balanced_shares(work, world_size)
    assert sum(share_mark(share) for share in agreed) == whole
    unread = data.draw(st.integers(0, len(work) - 1))
    other = balanced_shares([0 if at == unread else w for at, w in enumerate(work)], world_size)
    shares = [other[0], *agreed[1:]]
    each_once = sorted(p for share in shares for p in share) == list(range(len(work)))
    assert (sum(share_mark(share) for share in shares) == whole) == each_once


def test_a_mark_is_not_the_number_or_the_sum_of_positions():
    assert share_mark([0, 3]) != share_mark([1, 2])
    assert share_mark([0]) != 0


def test_balanced_shares_by_hand():
    assert balanced_shares([9, 1, 1, 1, 8, 7], 2) == [[0, 1, 2, 3], [4, 5]]
    # Every other sample, as one would deal them out, gives 18 and 9.
    by_turns = [sum([9, 1, 1, 1, 8, 7][rank::2]) for rank in (0, 1)]
    assert by_turns == [18, 9]
