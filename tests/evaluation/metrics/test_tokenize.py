import pytest

from vlmtune.evaluation.metrics.captions import tokenize_caption

# What Stanford's PTBTokenizer (CoreNLP 3.4.1) gave for these, as pycocoevalcap 1.2 calls it.
STANFORD = [
    ("A man riding a wave.", "a man riding a wave"),
    ("a cat; it's sleeping, isn't it?", "a cat it 's sleeping is n't it"),
    ('the man\'s "red" hat!', "the man 's red hat"),
    ("A black-and-white photo", "a black-and-white photo"),
    ("The U.S. flag waves in the wind.", "the u.s. flag waves in the wind"),
    ("A t-shirt that says 'hello world'", "a t-shirt that says hello world"),
    ("A sign that reads STOP, left.", "a sign that reads stop left"),
    ("It can't be 10:30 o'clock, can it?", "it ca n't be 10:30 o'clock can it"),
    ("They cannot see 3.5 miles away...", "they can not see 3.5 miles away"),
    ("The dogs' bowls cost $1,000.50 or 50%", "the dogs bowls cost $ 1,000.50 or 50 %"),
    ("we're gonna go; I wanna stay", "we 're gon na go i wan na stay"),
    ("A room with a desk/table and an in-room TV", "a room with a desk/table and an in-room tv"),
    ("A woman -- smiling -- holds a child\u2019s hand", "a woman smiling holds a child 's hand"),
    ("\u201ccurly\u201d ones", "curly ones"),
    ("A #1 fan & his e-mail me@x.com", "a # 1 fan & his e-mail me@x.com"),
    ("a kitchen w/ stove", "a kitchen w / stove"),
    ("Mr. Smith lives at St. Louis St.", "mr. smith lives at st. louis st."),
    ("a plate of food,with fork", "a plate of food with fork"),
    ("he'd rather've slept.", "he 'd rather 've slept"),
    ("5'10\" tall man, 1980s style", "5 10 tall man 1980s style"),
    ("A cup of caf\u00e9 au lait \u2013 hot", "a cup of caf\u00e9 au lait hot"),
    ("A dog jumping.A cat too", "a dog jumping.a cat too"),
    ("half-eaten sandwich on a plate ,", "half-eaten sandwich on a plate"),
    ("* a star and a _underscored_ word", "* a star and a _ underscored _ word"),
]


@pytest.mark.parametrize(("text", "words"), STANFORD)
def test_captions_are_split_as_by_stanfords_tokenizer(text: str, words: str) -> None:
    assert tokenize_caption(text) == words.split()


def test_splitting_at_spaces_is_not_enough() -> None:
    naive = sum(text.lower().rstrip(".").split() == words.split() for text, words in STANFORD)
    assert naive < len(STANFORD) / 3


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("a bus (front view)", "a bus front view"),  # there: -lrb- front view -rrb-
        ("bus no. 42", "bus no 42"),  # there: no. 42
        ("rock 'n' roll", "rock n roll"),  # there: 'n'
    ],
)
def test_known_deviations_from_it(text: str, ours: str) -> None:
    assert tokenize_caption(text) == ours.split()


def test_nothing_is_left_of_marks_and_spaces() -> None:
    assert tokenize_caption(" ... -- !? ") == []
