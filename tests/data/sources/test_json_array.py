"""JSON arrays by number, scanned in chunks: as `json.loads` has them, faults at their line."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.data.sources.json_array import JsonScanner, open_json_array
from vlmtune.errors import SampleError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # No half characters: a UTF-8 file cannot hold them as they are.
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("aé😀"), inner, max_size=3),
    max_leaves=12,
)


def _chunks(content: bytes, size: int):
    return (content[at : at + size] for at in range(0, len(content), size))


@given(
    values=st.lists(VALUES, max_size=5),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    size=st.integers(3, 50),
)
def test_items_and_their_places_do_not_depend_on_the_chunks(values, indent, ascii_only, size):
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode()
    scanner = JsonScanner(_chunks(content, size), "a.json")
    items = list(scanner.items())
    scanner.check_end()
    assert [item.value for item in items] == values
    assert [json.loads(content[item.start : item.end]) for item in items] == values


WHOLE = b'[\n{"a": "\\u00e9\xc3\xa9", "b": [1.5e3, true]},\n{"c": -7}\n]'


@given(size=st.integers(3, 80), cut=st.integers(1, len(WHOLE) - 1))
def test_a_text_that_is_cut_off_is_a_fault_wherever_the_chunks_end(size, cut):
    assert len(list(JsonScanner(_chunks(WHOLE, size), "a.json").items())) == 2
    with pytest.raises(SampleError):
        list(JsonScanner(_chunks(WHOLE[:cut], size), "a.json").items())


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('[\n{"a": 1},\n]', 3, "Expecting value"),
        ('[\n{"a": 1}\n{"a": 2}]', 3, "Expecting ','"),
        ('[{"a": 1}]\n\n[]', 3, "Extra data"),
        ('[\n{"a": 1},\n{"a": "\n"}]', 3, "Invalid control character"),
        ("[\n1,\nNaN]", 3, "NaN is not a JSON value"),
        ('[\n{"a": 1},\n' + "[" * 100_000, 3, "nested too deeply"),
        ('[\n{"a": "' + "x" * 3_000_000 + '",\n "b" 1}]', 3, "Expecting ':'"),
        ('[\n{"a": "never closed', 2, "Unterminated string"),
        ("[\n", 2, "Expecting value"),
    ],
)
def test_a_broken_array_is_an_error_at_its_line(tmp_path, cache_dir, content, line, reason):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(SampleError, match=reason) as caught:
        open_json_array(path, cache_dir=cache_dir)
    assert (caught.value.file, caught.value.line) == (str(path), line)


def test_an_item_that_only_strict_reading_refuses_is_a_bad_row(tmp_path, cache_dir):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": NaN}, {"a": 1, "a": 2}, 3, {"a": 4}]')
    rows = open_json_array(path, cache_dir=cache_dir)
    assert (rows[0], rows[4]) == ({"a": 1}, {"a": 4})
    for index, what in ((1, "NaN is not"), (2, "'a' is given twice"), (3, "not an object")):
        with pytest.raises(SampleError, match=what) as caught:
            rows[index]
        assert (caught.value.file, caught.value.line) == (str(path), index + 1)


def test_a_large_array_is_opened_without_being_held(tmp_path, cache_dir):
    path = tmp_path / "a.json"
    values = [{"id": n, "text": "x" * 2000} for n in range(10_000)]
    path.write_text(json.dumps(values))
    tracemalloc.start()
    rows = open_json_array(path, cache_dir=cache_dir)
    assert [rows[n] for n in (0, 5_000, 9_999)] == [values[n] for n in (0, 5_000, 9_999)]
    peak = tracemalloc.get_traced_memory()[1]
    held = json.loads(path.read_bytes())
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(held) == 10_000 and whole > 20_000_000
    assert peak < 10_000_000
