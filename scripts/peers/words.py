"""Made-up words: a lexicon of them for the tokenizer and for questions and answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

ONSETS = ["", *"bcdfghjklmnprstvz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "sh", "st", "tr"]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]
CODAS = ["", "", "l", "m", "n", "r", "s", "t", "nd", "st"]


def make_lexicon(num_words: int, *, seed: int) -> list[str]:
    """`num_words` different words of one to four syllables, short ones mostly first."""
    rng = random.Random(f"lexicon-{seed}")
    words: dict[str, None] = {}
    while len(words) < num_words:
        # A word drawn before is not there anew: the share of short ones falls by itself.
        syllables = 1 + min(3, int(4 * rng.random() * (len(words) + 1) / num_words + rng.random()))
        word = "".join(
            rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables)
        )
        words[word] = None
    return list(words)


def corpus(lexicon: Sequence[str]) -> list[str]:
    """Text to learn a vocabulary from: early words are frequent, as in any language."""
    return [
        " ".join([word] * max(2, min(200, 20 * len(lexicon) // (100 * (place + 1)))))
        for place, word in enumerate(lexicon)
    ]


def write_text(
    rng: random.Random, lexicon: Sequence[str], num_tokens: int, count: Callable[[str], int]
) -> str:
    """A sentence of about `num_tokens` tokens, at least one, by `count`'s number for each word."""
    words: list[str] = []
    tokens = 0
    while tokens < num_tokens:
        word = lexicon[int(len(lexicon) * rng.random() ** 2)]
        spoken = word if not words else " " + word
        if words and tokens + count(spoken) > num_tokens:
            break
        words.append(word)
        tokens += count(spoken)
    return " ".join(words)
