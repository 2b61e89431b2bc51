"""Any row ends as a conversation or as an error at its line, in every format."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.formats.examples import ROWS, row_of
from vlmtune.data.formats.base import COMMON_KEYS, check_trainable
from vlmtune.data.formats.registry import FORMATS, parse_row, unused_keys
from vlmtune.data.types import Conversation
from vlmtune.errors import SampleError

WORDS = [
    *("user", "assistant", "system", "human", "gpt", "text", "image", "video", "image_url"),
    *("Hi", "<image>", "<video>\n", "", " ", "a.png", "\ud83d", "\x00"),
]
PART_KEYS = [
    *("role", "content", "from", "value", "type", "text", "image", "video", "image_url", "url"),
    *("weight", "train", "answer", "bytes", "path", "detail"),
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -1, 0, 1]),
    st.floats(),
    st.binary(max_size=4),
    st.sampled_from(WORDS),
    st.text(alphabet=st.characters(), max_size=5),
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(PART_KEYS), inner, max_size=4),
    ),
    max_leaves=12,
)


@st.composite
def spoiled(draw: st.DrawFn, value: object) -> object:
    """`value` with one thing in it, at any depth, taken out or replaced."""
    if draw(st.integers(0, 4)) and isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        at = draw(st.sampled_from(list(keys)))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if draw(st.integers(0, 3)) == 0:
            del copy[at]
        else:
            copy[at] = draw(spoiled(value[at]))
        return copy
    return draw(st.one_of(junk, st.sampled_from(WORDS)))


def rows(name: str) -> st.SearchStrategy[object]:
    keys = sorted({key for row in ROWS[name] for key in row} | COMMON_KEYS | {"images", "videos"})
    good = st.sampled_from(ROWS[name])
    return st.one_of(
        st.dictionaries(st.sampled_from(keys), junk, max_size=6),
        st.tuples(good, st.dictionaries(st.sampled_from(keys), junk, min_size=1, max_size=2)).map(
            lambda pair: {**pair[0], **pair[1]}
        ),
        good.flatmap(spoiled),
        good.flatmap(spoiled),
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_a_conversation_or_an_error_at_its_line(name):
    endings = {"taken": 0, "refused": 0}

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(rows(name))
    def parse(values):
        if not isinstance(values, dict):
            return
        row = row_of(values)
        unused_keys(values, row.entry, name)
        try:
            conversation = parse_row(row, name)
        except SampleError as error:
            endings["refused"] += 1
            assert str(error).startswith("rows.jsonl:7: ")
            assert len(str(error).encode("utf-8")) < 2000
            return
        endings["taken"] += 1
        assert isinstance(conversation, Conversation)
        _check(conversation)

    parse()
    assert min(endings.values()) >= 5


def _check(conversation: Conversation) -> None:
    """What every later step relies on."""
    assert conversation.id
    for texts in (conversation.answers, conversation.options):
        assert all(isinstance(text, str) and text.encode("utf-8") is not None for text in texts)
    roles = [turn.role for turn in conversation.turns]
    asked = roles[1:] if roles[0] == "system" else roles
    assert asked == (["user", "assistant"] * len(asked))[: len(asked)]
    assert roles[-1] == "assistant" or conversation.answers
    for turn in conversation.turns:
        assert turn.parts and 0 <= turn.weight <= 1e6
        assert turn.text.encode("utf-8") is not None
    try:
        check_trainable(conversation)
    except SampleError as error:
        assert str(error).startswith("rows.jsonl:7: ")
