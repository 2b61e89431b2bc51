import random

from nltk.metrics.distance import edit_distance as nltk_edit_distance

from vlmtune.evaluation.metrics.text import common_length, edit_distance


def common_length_by_table(a: str, b: str) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else longer
    return table[-1][-1]


def random_pairs() -> list[tuple[str, str]]:
    generator = random.Random(0)
    lengths = [(0, 0), (0, 5), (5, 0), (1, 1), (70, 90)]
    lengths += [(generator.randint(0, 20), generator.randint(0, 20)) for _ in range(200)]
    return [
        ("".join(generator.choices("abcd", k=a)), "".join(generator.choices("abcd", k=b)))
        for a, b in lengths
    ]


def test_distances_by_hand() -> None:
    assert edit_distance("kitten", "sitting") == 3  # k -> s, e -> i, + g
    assert edit_distance("ab", "ba") == 2  # swapping is two edits
    assert common_length("kitten", "sitting") == 4  # i t t n
    assert common_length(["red", "cat"], ["cat", "red"]) == 1


def test_edit_distance_is_nltks() -> None:
    for a, b in random_pairs():
        assert edit_distance(a, b) == nltk_edit_distance(a, b), (a, b)


def test_common_length_is_the_tables() -> None:
    for a, b in random_pairs():
        assert common_length(a, b) == common_length_by_table(a, b), (a, b)
    # Not merely the letters that both have.
    assert common_length("abc", "cba") == 1
