"""Placing text tokens between written-out pictures; token 9 is the picture's."""

from __future__ import annotations

from vlmtune.data.alignment import align_segments, tokens_of_span

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
