"""Which format rows are in, what is said of it, and what is not read of a row."""

from __future__ import annotations

import json
import logging

import pytest

from tests.data.formats.examples import ASSISTANT, ROWS, USER, read, row_of
from vlmtune.data.dataset import load_conversations
from vlmtune.data.formats.registry import FORMATS, check_entry, parse_row, unused_keys
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError
from vlmtune.recipe.data_section import DataEntry


@pytest.fixture
def load(tmp_path, caplog):
    """`load(rows, **entry)`: the conversations of a file of `rows`, and what was said of it."""

    def load_rows(rows, **entry):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="vlmtune"):
            conversations, _ = load_conversations(
                [DataEntry(path=str(path), **entry)], check_media=False
            )
        return conversations, caplog.records[0].getMessage()

    return load_rows


def test_every_format_has_examples():
    assert ROWS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_told_from_its_rows_and_said(name, load):
    conversations, message = load(ROWS[name])
    assert len(conversations) == 3
    assert f"3 rows, format {name} (detected)" in message


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_may_be_named(name, load):
    conversations, message = load(ROWS[name], format=name)
    assert len(conversations) == 3
    assert f"format {name} (named)" in message


@pytest.mark.parametrize("name", FORMATS)
def test_every_key_of_the_examples_is_read(name):
    for row in ROWS[name]:
        assert unused_keys(row, DataEntry(path="a"), name) == set()
        assert unused_keys({**row, "author": "me"}, DataEntry(path="a"), name) == {"author"}


def test_the_columns_of_a_table_are_said(load):
    _, message = load(ROWS["table"])
    assert message.endswith("(detected), image: image_path, caption: caption")
    _, message = load(ROWS["table"], columns={"image": "image_path"}, format="table")
    assert message.endswith("(named), image: image_path, caption: caption")


def test_rows_of_texts_only_are_messages_unless_others_have_image_urls(load):
    text = {"messages": [USER, ASSISTANT]}
    _, message = load([text] * 3)
    assert "format messages" in message
    conversations, message = load([text, text, ROWS["openai"][0]])
    assert "format openai" in message and len(conversations) == 3


def test_named_columns_make_a_table_of_rows_that_look_like_another_format(load):
    rows = [{"image": "a.png", "text": "x", "alt": f"long {i}"} for i in range(3)]
    assert "format image_text" in load(rows)[1]
    conversations, message = load(rows, columns={"caption": "alt"})
    assert "format table" in message
    assert conversations[2].turns[1].text == "long 2"


def test_a_few_other_rows_do_not_change_the_format_and_are_errors(load):
    rows = [*ROWS["alpaca"], *ROWS["sharegpt"][:1]]
    with pytest.raises(ErrorGroup, match=r"rows\.jsonl:4: the row is in the format sharegpt, its"):
        load(rows)


PAIRS = [(name, other) for name in FORMATS for other in FORMATS if name != other]


@pytest.mark.parametrize(("name", "other"), PAIRS)
def test_a_wrong_guess_reads_the_row_alike_or_is_an_error(name, other):
    """Where another format takes the row, the questions and answers are the same ones, but for
    what is asked where the row has no question."""
    for values in ROWS[name]:
        right = read(name, values)
        try:
            wrong = parse_row(row_of(values), other)
        except SampleError:
            continue
        answer = right.turns[-1].text
        assert wrong.turns[-1].text.strip() in (answer, *right.answers)
        assert [image.ref for image in wrong.images] == [image.ref for image in right.images]


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("messages", {"prompt": "What?"}),
        ("vqav2", {"prompt": "What?"}),
        ("chartqa", {"columns": {"image": "imgname"}, "format": "chartqa"}),
        ("messages", {"columns": {"image": "a"}}),
    ],
)
def test_what_a_format_does_not_regard_is_an_error(name, entry, load):
    key = next(key for key in entry if key != "format")
    with pytest.raises(VlmtuneError, match=rf"rows\.jsonl: `{key}` has no effect in .*{name}"):
        load(ROWS[name], **entry)


def test_what_a_format_regards_is_none(load):
    assert len(load(ROWS["class_folders"], prompt="What?")[0]) == 3
    entry = DataEntry(path="questions.json", annotations="answers.json", format="vqav2")
    check_entry(entry, "vqav2", file="questions.json")
    with pytest.raises(VlmtuneError, match="questions.json: `annotations` has no effect"):
        check_entry(entry, "docvqa", file="questions.json")


def test_rows_of_no_format_say_what_they_lack(load):
    with pytest.raises(ErrorGroup, match="there are no messages; got: keys a, b.*set the format"):
        load([{"a": "x", "b": "y"}])


def test_a_table_of_unknown_columns_asks_which_is_which(load, tmp_path, caplog):
    caplog.set_level("INFO", logger="vlmtune")
    path = tmp_path / "rows.csv"
    for text, named in (("bild,text_de\na.png,Hi\n", "bild, text_de"), ("a,b\n1\n", None)):
        path.write_text(text)
        with pytest.raises(ErrorGroup) as caught:
            load_conversations([path], check_media=False)
        assert "messages" not in str(caught.value)
        assert "format table (the rows match no format)" in caplog.text
        if named:
            assert f"rows.csv:2: the columns do not form a sample; got: keys {named}" in str(
                caught.value
            )
            assert "the first line of the file is the names" in str(caught.value)


def test_a_class_that_is_a_number_is_an_error_where_numbers_are_texts(load, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("image,label\na.png,7\n")
    with pytest.raises(ErrorGroup, match="rows.csv:2: the label is a number.*format: table"):
        load_conversations([path], check_media=False)
    as_table = DataEntry(path=str(path), format="table")
    assert load_conversations([as_table], check_media=False)[0][0].turns[1].text == "7"
    assert load([{"image": "a.png", "label": "7"}])[0][0].turns[1].text == "7"


def test_rows_without_the_columns_that_are_named_say_so(load):
    with pytest.raises(ErrorGroup, match="there is no column b; got: keys a"):
        load([{"a": "x"}], columns={"caption": "b"})
    with pytest.raises(ErrorGroup, match="not an object") as caught:
        load([3], columns={"caption": "b"})
    assert "no effect" not in str(caught.value)
