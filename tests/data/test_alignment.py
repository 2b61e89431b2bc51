"""Placing text tokens between written-out pictures; token 9 is the picture's."""

from __future__ import annotations

from vlmtune.data.tokens import (
    Alignment,
    align_by_characters,
    align_by_tokens,
    align_segments,
    tokens_of_span,
)

IMAGE = 9


def test_text_without_pictures_must_be_the_same():
    assert align_segments([1, 2], [1, 2], IMAGE) == [(0, 2, 0)]
    assert align_segments([1, 2], [0, 1, 2], IMAGE) is None


def test_texts_are_placed_around_written_out_pictures():
    plain = [1, 9, 2, 3, 9, 4]
    processed = [1, 7, 9, 9, 8, 2, 3, 7, 9, 8, 4]
    assert align_segments(plain, processed, IMAGE) == [(0, 1, 0), (2, 2, 5), (5, 1, 10)]


def test_a_text_that_could_stand_in_two_places_is_placed_nowhere():
    # 8 stands inside each picture's own tokens and between the two pictures.
    processed = [1, 9, 8, 9, 8, 9, 8, 9, 4]
    assert align_segments([1, 9, 8, 9, 4], processed, IMAGE) == [(0, 1, 0), (2, 1, None), (4, 1, 8)]


def test_disagreement_at_either_end_or_between_is_seen():
    processed = [1, 9, 9, 2, 9, 4]
    for wrong in ([5, 9, 2, 9, 4], [1, 9, 5, 9, 4], [1, 9, 2, 9, 5], [1, 9, 2, 9, 2, 9, 4]):
        assert align_segments(wrong, processed, IMAGE) is None


def test_a_span_takes_every_token_it_touches_and_no_added_one():
    offsets = [(0, 0), (0, 4), (4, 5), (5, 8), (8, 8), (8, 9), (0, 0)]
    assert tokens_of_span(offsets, 4, 9) == (2, 5)
    assert tokens_of_span(offsets, 5, 8) == (3, 3)
    assert tokens_of_span(offsets, 9, 12) is None


# "ab<I>cd" written out as "ab[xxxx]cd": the placeholder's 3 characters became 6.
REPLACED = [{"span": (2, 5), "new_span": (2, 8)}]


def test_characters_after_a_written_out_picture_are_those_of_the_text():
    written = [(0, 0), (0, 2), (2, 3), (3, 7), (7, 8), (8, 9), (9, 10), (0, 0)]
    found = align_by_characters(written, REPLACED)
    expected = [(0, 0), (0, 2), (0, 0), (0, 0), (0, 0), (5, 6), (6, 7), (0, 0)]
    assert found == Alignment(expected, num_media_tokens=3, media_end=5)
    # The wrong variant: the characters as the processor's tokenizer counts them.
    assert tokens_of_span(written, 5, 7) != tokens_of_span(found.offsets, 5, 7) == (5, 6)


def test_of_a_token_across_the_edge_of_a_picture_the_text_counts():
    """Some families write line breaks around a picture, which merge with those of the text."""
    assert align_by_characters([(0, 1), (1, 3), (3, 7), (7, 9), (9, 10)], REPLACED) == Alignment(
        [(0, 1), (1, 2), (0, 0), (5, 6), (6, 7)], num_media_tokens=1, media_end=4
    )
    assert align_by_characters([(0, 1), (1, 9), (9, 10)], REPLACED).offsets[1] == (1, 6)


def test_two_pictures_move_what_follows_by_both():
    replaced = [*REPLACED, {"span": (6, 7), "new_span": (9, 20)}]
    found = align_by_characters([(0, 2), (2, 8), (8, 9), (9, 20), (20, 22)], replaced)
    assert found == Alignment([(0, 2), (0, 0), (5, 6), (0, 0), (7, 9)], 2, 4)


def test_a_text_without_pictures_keeps_its_characters():
    assert align_by_characters([(0, 2), (2, 3)], []) == Alignment([(0, 2), (2, 3)], 0, 0)


def test_tokens_place_the_characters_where_the_processor_says_none():
    offsets = [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 8)]
    processed = [1, 7, 9, 9, 8, 2, 3, 7, 9, 8, 4]
    found = align_by_tokens([1, 9, 2, 3, 9, 4], offsets, processed, IMAGE)
    assert found is not None and (found.num_media_tokens, found.media_end) == (7, 10)
    where = {position: span for position, span in enumerate(found.offsets) if span != (0, 0)}
    assert where == {0: (0, 1), 5: (2, 4), 6: (4, 5), 10: (6, 8)}
    assert align_by_tokens([5, 9, 2, 3, 9, 4], offsets, processed, IMAGE) is None


def test_a_text_that_stands_nowhere_for_certain_has_no_characters():
    processed = [1, 9, 8, 9, 8, 9, 8, 9, 4]
    found = align_by_tokens([1, 9, 8, 9, 4], [(i, i + 1) for i in range(5)], processed, IMAGE)
    assert found is not None and tokens_of_span(found.offsets, 2, 3) is None
    assert tokens_of_span(found.offsets, 4, 5) == (8, 8)
