"""CSV and TSV by number: as Python's csv has them, with the lines where records start."""

from __future__ import annotations

import csv
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtune.data.sources.csv import open_delimited
from vlmtune.errors import SampleError, VlmtuneError

CELLS = st.text(st.sampled_from('aé😀 ,;\t"\n\x85\u2028'), max_size=6)


@given(
    rows=st.lists(st.tuples(CELLS, CELLS).filter(lambda r: "".join(r).strip()), max_size=8),
    bom=st.booleans(),
    delimiter=st.sampled_from([",", "\t", ";"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
)
def test_records_are_those_that_were_written(tmp_path_factory, rows, bom, delimiter, line_end):
    path = tmp_path_factory.mktemp("cells") / ("a.tsv" if delimiter == "\t" else "a.csv")
    with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as stream:
        writer = csv.writer(
            stream, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL
        )
        writer.writerows([("one", "two"), *rows])
    opened = open_delimited(path, cache_dir=path.parent / "cache")
    read = [opened[index] for index in range(len(opened))]
    assert read == [{"one": one, "two": two} for one, two in rows]


def _write(tmp_path, text, name="data.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_blank_lines_and_quoted_line_breaks_do_not_move_the_line_numbers(tmp_path, cache_dir):
    path = _write(tmp_path, 'image,caption\n\na.png,"two\nlines"\n \nb.png,one\n\n')
    rows = open_delimited(path, cache_dir=cache_dir)
    assert [rows[0], rows[1]] == [
        {"image": "a.png", "caption": "two\nlines"},
        {"image": "b.png", "caption": "one"},
    ]
    assert [rows.place(index).line for index in range(2)] == [3, 6]


@pytest.mark.parametrize(
    ("text", "name", "row"),
    [
        ("a,b;c\n1,2\n", "x.csv", {"a": "1", "b;c": "2"}),
        ("a;b\n1,5;2\n", "x.csv", {"a": "1,5", "b": "2"}),
        ("a\tb\n1\t2\n", "x.csv", {"a": "1", "b": "2"}),
        ("a,b\tc\n1,2\t3\n", "x.tsv", {"a,b": "1,2", "c": "3"}),
        ("sep=;\r\na;b,c,d\r\n1;2\r\n", "x.csv", {"a": "1", "b,c,d": "2"}),
        ("\ufeffSEP=,\na,b;c;d\n1,2\n", "x.csv", {"a": "1", "b;c;d": "2"}),
        ("sep=\t\na\tb\n1\t2\n", "x.tsv", {"a": "1", "b": "2"}),
        ("sep=x,b\n1,2\n", "x.csv", {"sep=x": "1", "b": "2"}),
        ("a\n1\n", "x.csv", {"a": "1"}),
        ("a| b;c| d\n1| 2, 3| 4\n", "x.csv", {"a": "1", "b;c": "2, 3", "d": "4"}),
        (",b\n0,2\n", "x.csv", {"column 1": "0", "b": "2"}),
    ],
)
def test_the_delimiter_is_the_endings_or_the_headers(tmp_path, cache_dir, text, name, row):
    assert open_delimited(_write(tmp_path, text, name), cache_dir=cache_dir)[0] == row


def test_spaces_after_separators_go_where_the_header_has_them(tmp_path, cache_dir):
    path = _write(tmp_path, 'a, b, c\n1, "2, 3",  4 \n')
    assert open_delimited(path, cache_dir=cache_dir)[0] == {"a": "1", "b": "2, 3", "c": "4 "}
    kept = _write(tmp_path, "a, b,c\n1, 2, 3\n", "kept.csv")
    assert open_delimited(kept, cache_dir=cache_dir)[0] == {"a": "1", "b": " 2", "c": " 3"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"only one", "different numbers of cells.*quote cells that hold commas"),
        (b"a,b,c", "different numbers of cells.*quote cells that hold commas"),
        (b"a,b, ,", "got: 4;.*remove the commas at its end"),
        (b' ,""', "all cells of the row are empty"),
        (b'"a"b,c', "row cannot be parsed"),
        (b"\xff,a", "not UTF-8"),
    ],
)
def test_a_bad_row_is_named_and_the_next_is_read(tmp_path, cache_dir, line, reason):
    path = _write(tmp_path, b"one,two\n1,2\n" + line + b"\n3,4\n")
    rows = open_delimited(path, cache_dir=cache_dir)
    with pytest.raises(SampleError, match=reason) as caught:
        rows[1]
    assert (caught.value.file, caught.value.line) == (str(path), 3)
    assert rows[2] == {"one": "3", "two": "4"}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('one,two\n1,2\n3,"open\n5,6\n', 3, "quote in this row is not closed"),
        ("one,one\n1,2\n", 1, "two columns have the same name"),
        ('"one"x,two\n1,2\n', 1, "header cannot be parsed"),
        ("\ngröße,two\n1,2\n".encode("latin-1"), 2, "names of the columns are not UTF-8"),
    ],
)
def test_a_file_whose_rows_cannot_be_found_is_an_error(tmp_path, cache_dir, text, line, reason):
    path = _write(tmp_path, text)
    with pytest.raises(VlmtuneError, match=reason) as caught:
        open_delimited(path, cache_dir=cache_dir)
    assert not isinstance(caught.value, SampleError)
    assert (caught.value.file, caught.value.line) == (str(path), line)


def test_a_header_alone_is_no_row(tmp_path, cache_dir):
    for text in ("", "a,b\n", "\n\n"):
        assert len(open_delimited(_write(tmp_path, text), cache_dir=cache_dir)) == 0


def test_a_cell_may_hold_a_picture_in_base64(tmp_path, cache_dir):
    path = _write(tmp_path, "image,caption\n" + "A" * 300_000 + ",x\n")
    assert len(open_delimited(path, cache_dir=cache_dir)[0]["image"]) == 300_000


def test_an_index_from_the_cache_reads_the_same_and_another_files_does_not(
    tmp_path, cache_dir, always_kept
):
    path = _write(tmp_path, "a,b\n" + "".join(f"{n},x{n}\n" for n in range(50)))
    first = open_delimited(path, cache_dir=cache_dir)
    again = pickle.loads(pickle.dumps(open_delimited(path, cache_dir=cache_dir)))
    expected = [{"a": str(n), "b": f"x{n}"} for n in range(50)]
    assert [again[n] for n in range(50)] == expected
    other = _write(tmp_path, "a,b\n" + "".join(f"{n},x{n}\n" for n in reversed(range(50))), "o.csv")
    foreign = open_delimited(other, cache_dir=cache_dir).table
    wrong = dataclasses.replace(first, index=foreign)
    with pytest.raises(SampleError, match="different numbers of cells"):
        [wrong[n] for n in range(50)]
