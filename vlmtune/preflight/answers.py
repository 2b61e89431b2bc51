"""Answers that teach nothing: without a letter, an empty cell's mark, or in their own question.

All are hints, not proofs, and only ever warnings. An answer counts as leaking where the whole of
it, of at least four characters or two words, stands word for word in the user's turn before it,
and the question does not offer it as a choice.
"""

from __future__ import annotations

import re

from vlmtune.data.text import shorten
from vlmtune.data.types import Conversation

LEAK = "the answer stands in its question"
NO_WORDS = "the answer holds no letter and no digit"
EMPTY_CELL = "the answer is how tables write an empty cell"

MIN_CHARACTERS = 4
_EMPTY_CELLS = frozenset({"nan", "null", "<na>", "#n/a"})
_EDGES = " \t\r\n.,;:!?\"'()[]"
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_CHOICE_WORD = re.compile(r"\b(?:or|either|true|false|yes|no)\b", re.IGNORECASE)
_BULLET = re.compile(r"\s*(?:[-*•]|\(?[A-Za-z0-9]{1,2}[.):])?\s*")
_SEPARATED = re.compile(r"[,;]")
_ENUMERATED = re.compile(r"(?:^|\n|\s)\(?[A-Za-z1-9][.)]\s")


def odd_answers(conversation: Conversation) -> list[tuple[str, str]]:
    """(kind, message) for each supervised answer that teaches nothing."""
    found = []
    question = ""
    for number, turn in enumerate(conversation.turns, start=1):
        if turn.role == "user":
            question = turn.text
        if turn.role != "assistant" or turn.weight == 0:
            continue
        answer = turn.text.strip()
        if not any(character.isalnum() for character in answer):
            found.append((NO_WORDS, f"turn {number}: {NO_WORDS}; got: {shorten(answer, 40)!r}"))
        elif answer.lower() in _EMPTY_CELLS:
            found.append((EMPTY_CELL, f"turn {number}: {EMPTY_CELL}; got: {answer!r}"))
        elif not conversation.options and leaks(answer, question):
            got = f"{shorten(answer, 40)!r} in {shorten(question, 100)!r}"
            found.append((LEAK, f"turn {number}: {LEAK}; got: {got}"))
    return found


def leaks(answer: str, question: str) -> bool:
    """Whether `answer` is given away by `question`: see the module's first words."""
    words = answer.strip(_EDGES)
    if len(words) < MIN_CHARACTERS and len(words.split()) < 2:
        return False
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    whole = re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE)
    places = list(whole.finditer(question))
    return bool(places) and not any(_is_offered(question, place) for place in places)


def _is_offered(question: str, place: re.Match[str]) -> bool:
    """Whether the words at `place` are one of several that the question offers."""
    if len(_ENUMERATED.findall(question)) > 1:
        return True
    around = [s for s in _SENTENCE.finditer(question) if s.start() <= place.start() < s.end()]
    if any(_CHOICE_WORD.search(sentence.group()) for sentence in around):
        return True
    before, after = question[: place.start()], question[place.end() :]
    line_before, line_after = before.rpartition("\n")[2], after.partition("\n")[0]
    is_own_line = _BULLET.fullmatch(line_before) and not line_after.strip(_EDGES)
    if is_own_line and question.strip().count("\n") > 1:
        return True
    beside = before.rstrip()[-1:] + after.lstrip()[:1]
    if set(beside) & set("/|"):
        return True
    return bool(set(beside) & set(",;")) and len(_SEPARATED.findall(question)) > 1
