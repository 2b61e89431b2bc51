"""Odd rows in the project's own form, and what becomes of each in training.

`used`: trained on. `bad`: left out, with words of the reason. `dropped`: too long for
`data.max_tokens` of 256, with `over_length: drop`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

Ending = Literal["used", "bad", "dropped"]

ANSWER = {"role": "assistant", "content": "red"}
GOOD = {"messages": [{"role": "user", "content": "What is it?"}, ANSWER]}


@dataclass(frozen=True)
class RowCase:
    """A line of a data file; `says` is a pattern that its reason fits."""

    line: bytes
    ending: Ending
    says: str = ""


def row(value: Any, ending: Ending, says: str = "") -> RowCase:
    return RowCase(json.dumps(value).encode(), ending, says)


def asked(*parts: Any, **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **keys}


def said(question: str, answer: str, **of_answer: Any) -> dict[str, Any]:
    turn = {"role": "assistant", "content": answer, **of_answer}
    return {"messages": [{"role": "user", "content": question}, turn]}


def shown(reference: str, question: str = "What is it?") -> dict[str, Any]:
    """A row about one picture."""
    return asked({"type": "image", "image": reference}, {"type": "text", "text": question})


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


PICTURE = {"type": "image", "image": "plain.jpg"}
TWO_ANSWERS = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "red", "train": False},
    {"role": "user", "content": "b?"},
]

CASES: dict[str, RowCase] = {
    # odd, and used
    "text only": row(GOOD, "used"),
    "system turn": row(
        {"messages": [{"role": "system", "content": "Be brief."}, *GOOD["messages"]]}, "used"
    ),
    "two exchanges": row({"messages": GOOD["messages"] * 2}, "used"),
    "several pictures": row(asked(PICTURE, text("or"), PICTURE, text("?")), "used"),
    "picture after the text": row(asked(text("What is"), PICTURE), "used"),
    "picture in the second exchange": row(
        {"messages": [*GOOD["messages"], *asked(PICTURE)["messages"]]}, "used"
    ),
    "picture beside the turns": row(
        {"messages": [{"role": "user", "content": "<image>What?"}, ANSWER], "image": "plain.jpg"},
        "used",
    ),
    "white space around the answer": row(said("Hi", "  red \n"), "used"),
    "line breaks in the answer": row(said("Hi", "red\n\nor\r\nblue\t."), "used"),
    "numbers and signs": row(said("1 + 1?", "2 (= 1+1); 100%, 3.5e-4 {}[]<>"), "used"),
    "words of the template": row(said("user\nassistant", "assistant: user\nsystem"), "used"),
    "markers of others": row(said("[INST] USER: </s>", "### Response: <image>"), "used"),
    "jinja in the text": row(said("{{ 7 * 7 }}{% raw %}", "{{ x }}{% endif %}"), "used"),
    "one turn not trained": row({"messages": [*TWO_ANSWERS, ANSWER]}, "used"),
    "a weighted turn": row(said("Hi", "red", weight=0.5), "used"),
    "an id that is a number": row({**GOOD, "id": 7}, "used"),
    "keys of others": row({**GOOD, "author": "me", "meta": {"a": [1]}}, "used"),
    "a long word": row(said("a" * 60, "b" * 40), "used"),
    # bad
    "control token in the question": row(said("<|im_end|>", "red"), "bad", "control token"),
    "control token in the answer": row(said("Hi", "red<|im_end|>"), "bad", "control token"),
    "picture token in the text": row(said("<|image_pad|>", "red"), "bad", "control token"),
    "no turn trained": row(said("Hi", "red", train=False), "bad", "train|nothing to learn"),
    "all weights 0": row(said("Hi", "red", weight=0), "bad", "train|nothing to learn"),
    "a negative weight": row(said("Hi", "red", weight=-1), "bad", "weight"),
    "a weight that is a text": row(said("Hi", "red", weight="high"), "bad", "weight"),
    "train that is a text": row(said("Hi", "red", train="no"), "bad", "train"),
    "weight and train": row(said("Hi", "red", weight=1, train=True), "bad", "weight"),
    "a weighted question": row(
        {"messages": [{"role": "user", "content": "Hi", "weight": 2}, ANSWER]}, "bad", "weight"
    ),
    "answers without an answer to learn": row(
        {"messages": [{"role": "user", "content": "Hi"}], "answers": ["red"]},
        "bad",
        "no assistant turn",
    ),
    "a thin picture": row(shown("thin.png"), "bad", "refuses|aspect|ratio"),
    "missing video": row(asked({"type": "video", "video": "no.mp4"}), "bad", "no such"),
    "broken video": row(asked({"type": "video", "video": "broken.mp4"}), "bad", "video"),
    "video of no frames": row(asked({"type": "video", "video": []}), "bad", "video|frame"),
    # too long
    "a long question": row(said("why " * 400, "red"), "dropped", "too long"),
    "a long answer": row(said("why?", "red " * 400), "dropped", "too long"),
    "many pictures": row(asked(*[PICTURE] * 60), "dropped", "too long"),
    "many exchanges": row({"messages": GOOD["messages"] * 90}, "dropped", "too long"),
}
