import pytest

from vlmtune.evaluation.metrics.text import CONTRACTIONS, normalize_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("  yes\n", "yes"),
        ("yes.", "yes"),
        ("The red Circle", "red circle"),
        ("an apple a day", "apple day"),
        ("two", "2"),
        ("none", "0"),
        ("ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebodyd", "somebody'd"),
        ("its", "its"),
        ("well", "well"),
        ("bob's", "bob's"),
        ("10:30", "10:30"),
        ("t-shirt", "t shirt"),  # no space around: the mark leaves one
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("wait - what", "wait what"),
        ("mid-day - noon", "midday noon"),  # a mark that touches a space once goes everywhere
        ("1,000", "1000"),
        ("$1,000-2,000", "$10002000"),  # a digit group: every mark goes without a trace
        ("3.5", "3.5"),
        (".5", ".5"),
        ("3.", "3"),
        ("st. louis", "st louis"),
        ("U.S.A.", "usa"),
        ("yes!", "yes"),
        ("what?!", "what"),
        ("", ""),
        ("the", "the"),  # nothing would be left of these: a letter A, an operator
        ("A", "a"),
        ("?", "?"),
    ],
)
def test_an_answer_is_normalized_as_the_protocol_says(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_normalizing_twice_changes_nothing_for_ordinary_answers() -> None:
    for text in ("The 2 dogs", "dont", "red, blue", "10:30", "U.S.A."):
        once = normalize_answer(text)
        assert normalize_answer(once) == once


def test_contractions_lack_exactly_one_apostrophe() -> None:
    assert CONTRACTIONS["yall'd've"] == "y'all'd've"
    assert "yalldve" not in CONTRACTIONS
    assert all(len(whole) == len(broken) + 1 for broken, whole in CONTRACTIONS.items())
    # Words of their own that a careless list would turn into contractions.
    for word in ("well", "shell", "hell", "ill", "id", "its", "lets", "were", "shed", "wed"):
        assert word not in CONTRACTIONS
