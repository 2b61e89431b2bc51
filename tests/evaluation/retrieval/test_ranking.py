"""Ranks worked by hand and against sorted lists; exactly chance without information."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from tests.evaluation.retrieval.processes import run_processes
from vlmtune.errors import VlmtuneError
from vlmtune.evaluation.retrieval.ranking import (
    Block,
    Blocks,
    Rankings,
    Relevance,
    direction_figures,
    median_interval,
    rank_blocks,
    rank_with_ties,
)


def in_blocks(
    scores: np.ndarray, size: int = 2, *, prior: np.ndarray | None = None, rows: list | None = None
) -> Blocks:
    numbers = list(range(len(scores))) if rows is None else rows

    def blocks() -> Iterator[Block]:
        for start in range(0, len(numbers), size):
            pictures = np.array(numbers[start : start + size])
            shared = None if prior is None else prior.astype(np.float32)
            yield Block(pictures, scores[pictures].astype(np.float32), shared)

    return blocks


def captions(num_pictures: int, each: int) -> Relevance:
    texts = tuple(tuple(range(n * each, (n + 1) * each)) for n in range(num_pictures))
    return Relevance(texts, num_pictures * each)


def ranks(rankings: Rankings) -> tuple[list[float], list[float]]:
    return [q.rank for q in rankings.texts], [q.rank for q in rankings.pictures]


def test_ranks_worked_by_hand_in_both_directions() -> None:
    # Three pictures; the first has two captions (0 and 1), the others one each.
    scores = np.array([[0.1, 0.9, 0.5, 0.2], [0.8, 0.3, 0.4, 0.7], [0.6, 0.2, 0.1, 0.9]])
    relevance = Relevance(((0, 1), (2,), (3,)), 4)
    rankings = rank_blocks(in_blocks(scores), relevance)
    assert ranks(rankings) == ([1, 3, 1], [3, 1, 2, 1])
    assert [q.recalls for q in rankings.texts] == [(1, 1, 1), (0, 1, 1), (1, 1, 1)]
    assert [q.reciprocal_rank for q in rankings.pictures] == [1 / 3, 1, 1 / 2, 1]
    assert [item for item, _ in rankings.texts[1].top] == [0, 3, 2, 1]
    assert [item for item, _ in rankings.pictures[2].top] == [0, 1, 2]
    assert rankings.pictures[2].top[0][1] == pytest.approx(0.5)


def test_a_picture_is_right_with_any_of_its_captions_and_each_caption_is_a_query() -> None:
    scores = np.array([[3.0, 0.0, 1.0, 1.5], [2.0, 2.5, 9.0, 0.5]])
    rankings = rank_blocks(in_blocks(scores), captions(2, 2))
    assert [q.recalls[0] for q in rankings.texts] == [1, 1]
    assert [q.recalls[0] for q in rankings.pictures] == [1, 0, 1, 0]


def test_without_ties_ranks_are_places_in_a_sorted_list() -> None:
    # The usual evaluation code's way: sort, then look for each right item.
    scores = np.random.default_rng(0).normal(size=(12, 36))
    rankings = rank_blocks(in_blocks(scores, 5), captions(12, 3))
    place_in_row = np.argsort(np.argsort(-scores, axis=1), axis=1) + 1
    place_in_column = np.argsort(np.argsort(-scores, axis=0), axis=0) + 1
    to_texts = [place_in_row[n, 3 * n : 3 * n + 3].min() for n in range(12)]
    to_pictures = [place_in_column[text // 3, text] for text in range(36)]
    assert ranks(rankings) == (to_texts, to_pictures)
    first_caption_only = [place_in_row[n, 3 * n] for n in range(12)]
    assert first_caption_only != to_texts


@pytest.mark.parametrize(("num_pictures", "each"), [(20, 1), (12, 5), (3, 2)])
def test_a_constant_scorer_is_exactly_at_chance(num_pictures: int, each: int) -> None:
    relevance = captions(num_pictures, each)
    num_texts = num_pictures * each
    rankings = rank_blocks(in_blocks(np.full((num_pictures, num_texts), 0.25), 7), relevance)
    for query in rankings.pictures:
        expected = [min(1, k / num_pictures) for k in (1, 5, 10)]
        assert query.recalls == pytest.approx(expected, abs=1e-12)
        assert query.rank == pytest.approx((num_pictures + 1) / 2)
        harmonic = sum(1 / k for k in range(1, num_pictures + 1)) / num_pictures
        assert query.reciprocal_rank == pytest.approx(harmonic)
    for query in rankings.texts:
        # None of `each` right texts among the first k: a hypergeometric draw.
        missed = [
            np.prod(
                [max(0, num_texts - each - j) / (num_texts - j) for j in range(min(k, num_texts))]
            )
            for k in (1, 5, 10)
        ]
        assert query.recalls == pytest.approx([1 - miss for miss in missed], abs=1e-12)
        assert query.rank == pytest.approx((num_texts + 1) / (each + 1))
    # The wrong variant: breaking ties by position finds picture 0's own texts at once.
    by_position = np.argsort(-np.full(num_texts, 0.25), kind="stable")
    assert by_position[0] in relevance.texts_of[0]


def test_tied_items_are_worth_the_mean_over_their_orders() -> None:
    # Two items above; then 2 right and 3 wrong in any of their 5! orders.
    orders = list(itertools.permutations([True, True, False, False, False]))
    found = np.array([2 + order.index(True) + 1 for order in orders])
    recalls, rank, reciprocal = rank_with_ties(2, 2, 3)
    assert recalls == pytest.approx([np.mean(found <= k) for k in (1, 5, 10)])
    assert rank == pytest.approx(found.mean())
    assert reciprocal == pytest.approx((1 / found).mean())
    assert reciprocal != pytest.approx(1 / found.mean())


def test_blocks_their_order_and_the_processes_change_nothing() -> None:
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 6, size=(9, 18)).astype(float)  # many ties
    relevance = Relevance(tuple((n, n + 9) for n in range(8)) + ((8, 17, 0),), 18)
    whole = rank_blocks(in_blocks(scores, 9), relevance)
    assert rank_blocks(in_blocks(scores, 1), relevance) == whole
    backwards = in_blocks(scores, 4, rows=list(range(9))[::-1])
    assert rank_blocks(backwards, relevance) == whole

    def share(rank: int, gather) -> Rankings:
        mine = in_blocks(scores, 2, rows=list(range(rank, 9, 2)))
        return rank_blocks(mine, relevance, gather=gather)

    assert run_processes(share) == [whole, whole]
    with pytest.raises(AssertionError):  # without the other's rows
        share(0, list)


def test_a_prior_counts_where_texts_are_ranked_only() -> None:
    scores = np.array([[-1.0, -2.0], [-1.5, -1.9]])
    prior = np.array([-0.5, -3.0])
    with_prior = rank_blocks(in_blocks(scores, prior=prior), captions(2, 1))
    without = rank_blocks(in_blocks(scores), captions(2, 1))
    assert ranks(without) == ([1, 2], [1, 1])
    assert ranks(with_prior) == ([2, 1], [1, 1])


def test_a_score_that_is_no_number_is_an_error() -> None:
    scores = np.zeros((2, 2), dtype=np.float32)
    scores[1, 0] = np.nan
    with pytest.raises(VlmtuneError, match=r"not a number.*picture number 4"):
        Block(np.array([3, 4]), scores).check()
    Block(np.array([3, 4]), np.full((2, 2), -np.inf, dtype=np.float32)).check()


def test_figures_are_means_over_queries_with_intervals_by_picture() -> None:
    scores = np.array([[3.0, 0.0, 1.0, 1.5], [2.0, 2.5, 9.0, 0.5]])
    rankings = rank_blocks(in_blocks(scores), captions(2, 2))
    figures = direction_figures(rankings.pictures, clusters=[0, 0, 1, 1], seed=0)
    assert list(figures) == ["r1", "r5", "r10", "median_rank", "mrr"]
    assert figures["r1"].value == 0.5
    assert figures["mrr"].value == 0.75
    assert figures["median_rank"].value == 1.5
    assert figures["r1"].count == 4
    # Either picture has one right and one wrong caption: resampling pictures changes nothing.
    assert (figures["r1"].low, figures["r1"].high) == (0.5, 0.5)
    alone = direction_figures(rankings.pictures, clusters=[0, 1, 2, 3], seed=0)
    assert (alone["r1"].low, alone["r1"].high) == (0.0, 1.0)


def test_the_medians_interval_is_that_of_resampled_medians() -> None:
    generator = np.random.default_rng(2)
    ranks_ = generator.integers(1, 9, size=15).astype(float)
    clusters = [n // 2 for n in range(15)]
    interval = median_interval(ranks_, clusters=clusters, seed=3)
    assert interval.value == np.median(ranks_)
    draws = np.random.default_rng(3).integers(0, 8, size=(2000, 8))
    medians = [
        np.median(np.concatenate([ranks_[np.array(clusters) == c] for c in drawn]))
        for drawn in draws
    ]
    low, high = np.quantile(medians, [0.025, 0.975])
    assert (interval.low, interval.high) == (low, high)
