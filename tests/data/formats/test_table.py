"""Tables: which column is what, and what the columns make together."""

from __future__ import annotations

import pytest

from tests.data.formats.examples import read, row_of, said
from vlmtune.data.formats.registry import parse_row, unused_keys
from vlmtune.data.formats.table import columns_of
from vlmtune.errors import SampleError
from vlmtune.recipe.data_section import DataEntry

PLAIN = DataEntry(path="rows.csv")


def test_a_caption_answers_the_prompt():
    row = {"image": "a.png", "caption": "A cat."}
    assert said(read("table", row)) == [
        ("user", "[a.png]Describe the picture."),
        ("assistant", "A cat."),
    ]
    assert said(read("table", row, prompt="What?"))[0] == ("user", "[a.png]What?")


def test_a_question_has_an_answer_and_may_do_without_a_picture():
    row = {"question": "Two and two?", "answer": 4}
    assert said(read("table", row)) == [("user", "Two and two?"), ("assistant", "4")]
    for nothing in ("", None):
        assert said(read("table", {**row, "image": nothing}))[0] == ("user", "Two and two?")
    assert said(read("table", {**row, "image": "a.png"}))[0] == ("user", "[a.png]Two and two?")


def test_a_pictures_placeholder_says_where_it_stands():
    row = {"image": "a.png", "question": "Is\n<image>\nred?", "answer": "no"}
    assert said(read("table", row))[0] == ("user", "Is[a.png]red?")
    without = {"question": "What does <image> mean?", "answer": "A picture."}
    assert said(read("table", without))[0] == ("user", "What does <image> mean?")


def test_a_label_is_the_answer_even_as_a_number():
    conversation = read("table", {"image": "a.png", "label": 3})
    assert said(conversation)[1] == ("assistant", "3")


def test_of_a_list_of_answers_the_most_frequent_is_learned_and_all_are_kept():
    row = {"image": "a.png", "question": "What?", "answers": ["cat", "dog", "dog"]}
    conversation = read("table", row)
    assert (said(conversation)[1], conversation.answers) == (
        ("assistant", "dog"),
        ("cat", "dog", "dog"),
    )
    both = read("table", {**row, "answer": "cat"})
    assert (said(both)[1], both.answers) == (("assistant", "cat"), ("cat", "dog", "dog"))
    text = read("table", {**row, "answers": "cat"})
    assert (said(text)[1], text.answers) == (("assistant", "cat"), ("cat",))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["Image", "CAPTION"], {"image": "Image", "caption": "CAPTION"}),
        (["file_name", "text"], {"image": "file_name", "caption": "text"}),
        (["path", "Text", "ID"], {"id": "ID", "image": "path", "caption": "Text"}),
        (["url", "image_path", "caption"], {"image": "image_path", "caption": "caption"}),
        (["query", "response"], {"question": "query", "answer": "response"}),
        # A question with its answer goes before a caption.
        (
            ["image", "caption", "question", "answer"],
            {"image": "image", "question": "question", "answer": "answer"},
        ),
        (["image", "class"], {"image": "image", "label": "class"}),
    ],
)
def test_columns_are_told_by_their_usual_names(columns, expected):
    values = {name: "x" for name in columns}
    assert columns_of(values, PLAIN) == expected
    assert unused_keys(values, PLAIN, "table") == set(columns) - set(expected.values()) - {"ID"}


def test_the_recipes_columns_go_before_the_usual_names():
    values = {"image": "a.png", "text": "short", "alt": "A long text."}
    row = row_of(values, columns={"caption": "alt"})
    assert said(parse_row(row, "table"))[1] == ("assistant", "A long text.")
    assert unused_keys(values, row.entry, "table") == {"text"}
    # A column that was given one role is not guessed to have another.
    swapped = row_of({"text": "a.png", "alt": "Hi"}, columns={"image": "text", "caption": "alt"})
    assert said(parse_row(swapped, "table")) == [
        ("user", "[a.png]Describe the picture."),
        ("assistant", "Hi"),
    ]


def test_an_id_is_taken_from_its_column():
    values = {"key": "x7", "question": "a", "answer": "b"}
    assert read("table", values, columns={"id": "key"}).id == "x7"
    assert read("table", values).id == "rows:7"
    # A column of numbers with gaps is one of floats in pandas.
    assert read("table", {"id": 3.0, "question": "a", "answer": "b"}).id == "3"


def test_the_prompt_is_the_question_of_rows_that_have_none():
    for nothing in ("", None):
        row = {"image": "a.png", "question": nothing, "answer": "b"}
        assert said(read("table", row, prompt="What?"))[0] == ("user", "[a.png]What?")
    asked = {"image": "a.png", "question": "Which?", "answer": "b"}
    assert said(read("table", asked, prompt="What?"))[0] == ("user", "[a.png]Which?")


def test_an_answer_in_brackets_is_a_text():
    row = {"image": "a.png", "question": "Where?", "answer": "[10, 20, 30, 40]"}
    assert said(read("table", row))[1] == ("assistant", "[10, 20, 30, 40]")


BAD_ROWS = {
    "no sample": ({"a": "x", "b": "y"}, {}, "the columns do not form a sample; got: keys a, b"),
    "no keys": ({}, {}, "got: no keys"),
    "a picture alone": ({"image": "a.png"}, {}, "the columns do not form a sample"),
    "a caption alone": ({"caption": "A cat."}, {}, "the columns do not form a sample"),
    "a column that is not there": (
        {"image": "a.png", "caption": "A cat."},
        {"columns": {"caption": "alt"}},
        "there is no column alt; got: keys image, caption",
    ),
    "no picture": ({"image": "", "caption": "A cat."}, {}, "there is no picture"),
    "picture null": ({"image": None, "caption": "A cat."}, {}, "there is no picture"),
    "picture a number": ({"image": 3, "caption": "A cat."}, {}, "reference cannot be used"),
    "empty caption": ({"image": "a.png", "caption": " "}, {}, "turn 2 .* is empty"),
    "caption null": ({"image": "a.png", "caption": None}, {}, "caption is not a text; got: null"),
    "empty question": ({"question": "", "answer": "a"}, {}, "question is empty"),
    "a picture and no question": (
        {"image": "a.png", "question": " ", "answer": "a"},
        {},
        "question is empty; .*set the entry's prompt",
    ),
    "question null": ({"question": None, "answer": "a"}, {}, "question is not a text; got: null"),
    "a column in other letters": (
        {"IMAGE": "a.png", "caption": "A cat."},
        {"columns": {"image": "image"}},
        "there is no column image; got: keys IMAGE, caption; .*did you mean 'IMAGE'",
    ),
    "answers of a list as text": (
        {"question": "a", "answers": "['red', 'blue']"},
        {},
        "answers is a list written as a text",
    ),
    "question a number": ({"question": 3, "answer": "a"}, {}, "question is not a text"),
    "empty answer": ({"question": "a", "answer": ""}, {}, "turn 2 .* is empty"),
    "no answer": ({"question": "a", "answer": None}, {}, "there is no text in answer; got: null"),
    "answers empty": ({"question": "a", "answers": []}, {}, "there is no text in answers"),
    "answer true": ({"question": "a", "answer": True}, {}, "text 1 of answer is not a text"),
    "answer an object": ({"question": "a", "answer": {"a": 1}}, {}, "text 1 of answer has no"),
    "answer no number": ({"question": "a", "answer": float("nan")}, {}, "text 1 of answer is not"),
    "a placeholder too many": (
        {"image": "a.png", "question": "<image><image>", "answer": "a"},
        {},
        r"1 in image\(s\), 2 placeholders",
    ),
    "id no whole number": ({"id": 1.5, "question": "a", "answer": "b"}, {}, "a whole number"),
    "id nan": ({"id": float("nan"), "question": "a", "answer": "b"}, {}, "a whole number"),
    "empty id": ({"id": "", "question": "a", "answer": "b"}, {}, "the id cannot be used"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_malformed_row_is_an_error_at_its_place(case):
    values, entry, reason = BAD_ROWS[case]
    with pytest.raises(SampleError, match=rf"^rows\.jsonl:7: .*{reason}"):
        read("table", values, **entry)
