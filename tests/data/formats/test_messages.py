"""The project's own form: parts that take their pictures from the row's list."""

from __future__ import annotations

import pytest

from tests.data.formats.examples import ASSISTANT, read, said
from vlmtune.errors import SampleError


def _asked(*parts, **row):
    return {"messages": [{"role": "user", "content": list(parts)}, ASSISTANT], **row}


def test_parts_with_an_index_take_the_rows_pictures_in_turn():
    # Columns of objects fill in every key.
    parts = [
        {"type": "image", "index": 0, "text": None},
        {"type": "text", "text": " or ", "index": None},
        {"type": "image", "index": 1, "text": None},
    ]
    row = _asked(*parts, images=["a.png", "b.png"])
    assert said(read("messages", row))[0] == ("user", "[a.png] or [b.png]")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([{"type": "image", "index": 1}, {"type": "image", "index": 0}], "expected: index: 0"),
        ([{"type": "image", "index": 0}, {"type": "image", "index": 0}], "expected: index: 1"),
        ([{"type": "image", "index": False}], "takes its picture out of order"),
        ([{"type": "text", "text": "a", "index": 0}], "unknown key; got: index"),
        ([{"type": "image", "image": "a.png", "index": 0}], "unknown key; got: index"),
    ],
)
def test_an_index_that_is_not_the_next_pictures_is_an_error(parts, reason):
    with pytest.raises(SampleError, match=f"^rows.jsonl:7: turn 1, part . .*{reason}"):
        read("messages", _asked(*parts, images=["a.png", "b.png"]))


def test_an_index_without_a_list_is_an_error():
    with pytest.raises(SampleError, match="unknown key; got: index"):
        read("messages", _asked({"type": "image", "index": 0}))
