"""Questions and answers as turns: for rows that have one of each, or columns of them."""

from __future__ import annotations

from collections.abc import Sequence

from vlmtune.data.formats.beside import MediaBeside
from vlmtune.data.formats.rows import Row, build_conversation
from vlmtune.data.text import describe
from vlmtune.data.types import Conversation, Part, Text, Turn

Exchange = tuple[str, str | None]
"""A question and its answer; None: it is not answered."""


def exchanges_of(row: Row, *, question: str, answer: str | None) -> list[Exchange]:
    """The exchanges of the row's `history`, then the one given. Raises SampleError."""
    history = row.values.get("history")
    if history is None:
        history = []
    if not isinstance(history, list):
        raise row.error("history is not a list", got=describe(history), expected="[[question, …]]")
    earlier: list[Exchange] = []
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.error(
                f"exchange {number} of history cannot be used",
                got=f"{len(pair)} values" if isinstance(pair, list) else describe(pair),
                expected="[question, answer]",
            )
        place = f"exchange {number} of history"
        earlier.append(
            (
                row.text(pair[0], place=f"the question of {place}"),
                row.text(pair[1], place=f"the answer of {place}"),
            )
        )
    return [*earlier, (question, answer)]


def build_exchanges(
    row: Row,
    exchanges: Sequence[Exchange],
    *,
    beside: MediaBeside,
    system: str | None = None,
    id_key: str = "id",
    answers: Sequence[str] | None = None,
    question_type: str | None = None,
) -> Conversation:
    """The conversation of `exchanges`; pictures and videos go where their placeholders are, or in
    front of the first question where no question has any. Raises SampleError."""
    turns = [Turn("system", (Text(system),))] if system else []
    are_placed = any(beside.has_placeholder(question) for question, _ in exchanges)
    for number, (question, answer) in enumerate(exchanges):
        in_front: list[Part] = [] if are_placed or number else list(beside.in_front())
        turns.append(Turn("user", (*in_front, *beside.split(question))))
        if answer is not None:
            turns.append(Turn("assistant", (Text(answer),)))
    beside.check_all_taken()
    return build_conversation(
        row, turns, id_key=id_key, answers=answers, question_type=question_type
    )


def optional_text(row: Row, key: str) -> str | None:
    """The text under `key`, or None where there is none or it is null or empty."""
    value = row.values.get(key)
    return None if value is None else row.text(value, place=key) or None


def required_text(row: Row, key: str) -> str:
    """The text under `key`. Raises SampleError where there is none."""
    if row.values.get(key) is None:
        got = f"{key}: null" if key in row.values else row.keys
        raise row.error(f"there is no {key}", got=got, expected="a text")
    return row.text(row.values[key], place=key)
