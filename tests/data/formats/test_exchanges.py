"""Query and response, and Alpaca: a question, an answer, and what came before."""

from __future__ import annotations

import pytest

from tests.data.formats.examples import MODEL, PERSON, read, said
from vlmtune.data.types import Image
from vlmtune.errors import SampleError


def test_history_and_system_come_before_the_query():
    conversation = read(
        "query_response",
        {
            "query": "And <image>?",
            "response": "A dog.",
            "history": [["<image>What?", "A cat."], ["Sure?", "Yes."]],
            "system": "Be brief.",
            "images": ["a.png", "b.png"],
        },
    )
    assert said(conversation) == [
        ("system", "Be brief."),
        ("user", "[a.png]What?"),
        ("assistant", "A cat."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
        ("user", "And [b.png]?"),
        ("assistant", "A dog."),
    ]


def test_pictures_without_a_placeholder_stand_before_the_first_question():
    row = {"query": "Same?", "response": "No.", "images": ["a.png", "b.png"]}
    assert said(read("query_response", row))[0] == ("user", "[a.png][b.png]Same?")
    earlier = {**row, "history": [["Hi", "Yo"]]}
    assert [text for _, text in said(read("query_response", earlier))] == [
        "[a.png][b.png]Hi",
        "Yo",
        "Same?",
        "No.",
    ]


def test_an_instructions_input_is_on_a_line_of_its_own():
    row = {"instruction": "Translate.", "input": "Katze", "output": "cat"}
    assert said(read("alpaca", row)) == [("user", "Translate.\nKatze"), ("assistant", "cat")]
    for empty in ("", None):
        assert said(read("alpaca", {**row, "input": empty}))[0] == ("user", "Translate.")


def test_alpaca_has_pictures_history_and_system_too():
    row = {
        "instruction": "And this?",
        "output": "A dog.",
        "image": {"bytes": b"\x89PNG", "path": None},
        "history": [["Hello.", "Hello!"]],
        "system": "Be brief.",
    }
    conversation = read("alpaca", row)
    assert [turn.role for turn in conversation.turns] == ["system", *("user", "assistant") * 2]
    (picture,) = conversation.images
    assert isinstance(picture, Image) and picture.content == b"\x89PNG"


@pytest.mark.parametrize("name", ["query_response", "alpaca"])
def test_answers_stand_in_for_an_answer_that_is_not_there(name):
    question = {"query": "Hi"} if name == "query_response" else {"instruction": "Hi"}
    conversation = read(name, {**question, "answers": ["Yo", "Ya"]})
    assert (said(conversation), conversation.answers) == ([("user", "Hi")], ("Yo", "Ya"))


def test_an_empty_cell_is_no_picture_and_no_system_text():
    row = {"query": "Hi", "response": "Yo", "image": "", "system": ""}
    assert said(read("query_response", row)) == [("user", "Hi"), ("assistant", "Yo")]
    turns = {"conversations": [PERSON, MODEL], "image": ""}
    assert said(read("sharegpt", turns)) == [("user", "Hi"), ("assistant", "Yo")]


BAD_ROWS = {
    "a placeholder and an empty cell": (
        "query_response",
        {"query": "<image>Hi", "response": "Yo", "image": ""},
        r"0 in image\(s\), 1 placeholders",
    ),
    "no response": ("query_response", {"query": "Hi"}, "there is no response; got: keys query"),
    "response null": ("query_response", {"query": "Hi", "response": None}, "no response"),
    "no query": ("query_response", {"response": "Yo"}, "there is no query"),
    "query a list": ("query_response", {"query": ["Hi"], "response": "Yo"}, "query is not a text"),
    "empty query": (
        "query_response",
        {"query": " ", "response": "Yo"},
        r"turn 1 \(user\) is empty",
    ),
    "empty response": ("query_response", {"query": "Hi", "response": ""}, "turn 2 .* is empty"),
    "system a number": (
        "query_response",
        {"query": "Hi", "response": "Yo", "system": 3},
        "system is not a text",
    ),
    "history a text": (
        "query_response",
        {"query": "Hi", "response": "Yo", "history": "A"},
        "history is not a list",
    ),
    "history of texts": (
        "query_response",
        {"query": "Hi", "response": "Yo", "history": ["A", "B"]},
        "exchange 1 of history cannot be used",
    ),
    "history of threes": (
        "query_response",
        {"query": "Hi", "response": "Yo", "history": [["a", "b"], ["a", "b", "c"]]},
        "exchange 2 of history cannot be used; got: 3 values",
    ),
    "history of numbers": (
        "query_response",
        {"query": "Hi", "response": "Yo", "history": [["a", 2]]},
        "the answer of exchange 1 of history is not a text",
    ),
    "a picture too few": (
        "query_response",
        {"query": "<image><image>Hi", "response": "Yo", "images": ["a.png"]},
        r"1 in image\(s\), 2 placeholders",
    ),
    "no picture": (
        "query_response",
        {"query": "<image>Hi", "response": "Yo"},
        r"0 in image\(s\), 1 placeholders",
    ),
    "no output": ("alpaca", {"instruction": "Hi"}, "there is no output"),
    "no instruction": ("alpaca", {"output": "Hi"}, "there is no instruction"),
    "input a list": ("alpaca", {"instruction": "Hi", "input": [], "output": "Yo"}, "input is not"),
    "half a character": (
        "alpaca",
        {"instruction": "Hi", "input": "\ud83d", "output": "Yo"},
        "surrogate",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_malformed_row_is_an_error_at_its_place(case):
    name, values, reason = BAD_ROWS[case]
    with pytest.raises(SampleError, match=rf"^rows\.jsonl:7: .*{reason}"):
        read(name, values)
