"""Folders of pictures: what they are is told, or asked for; what is not used is counted."""

from __future__ import annotations

import os

import pytest

from vlmtune.data.sources.folder import Names, open_picture_folder
from vlmtune.errors import SampleError, VlmtuneError


@pytest.fixture
def make(tmp_path):
    """`make("a.png", …)`: a folder with these files; a text holds its own name."""

    def make_folder(*names):
        for name in names:
            path = tmp_path / "folder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f" about {name}\n")
        return tmp_path / "folder"

    return make_folder


def _read_all(rows) -> list:
    return [rows[index] for index in range(len(rows))]


def test_texts_beside_pictures_in_sorted_order(make):
    folder = make("b.JPG", "b.txt", "a.png", "a.txt", "sub/ü.webp", "sub/ü.txt")
    rows = open_picture_folder(folder, format_name=None)
    assert _read_all(rows) == [
        {"image": "a.png", "text": "about a.txt"},
        {"image": "b.JPG", "text": "about b.txt"},
        {"image": "sub/ü.webp", "text": "about sub/ü.txt"},
    ]
    assert (rows.base_dir, rows.place(2).line, rows.file) == (folder, 3, str(folder))


def test_folders_of_classes_in_sorted_order(make):
    folder = make("dog/1.png", "cat/b/2.png", "cat/1.png")
    rows = open_picture_folder(folder, format_name=None)
    assert _read_all(rows) == [
        {"image": "cat/1.png", "label": "cat"},
        {"image": "cat/b/2.png", "label": "cat"},
        {"image": "dog/1.png", "label": "dog"},
    ]


def test_the_recipes_word_goes_before_what_a_folder_looks_like(make):
    folder = make("cat/1.png", "cat/1.txt", "dog/1.png", "dog/1.txt")
    detected = open_picture_folder(folder, format_name=None)
    named = open_picture_folder(folder, format_name="class_folders")
    assert [set(rows[0]) for rows in (detected, named)] == [
        {"image", "text"},
        {"image", "label"},
    ]


@pytest.mark.parametrize(
    ("names", "format_name", "bad", "reason"),
    [
        (["a.png", "a.txt", "b.png"], None, 1, "no text.*b.txt"),
        (["a.png", "x/b.png"], "class_folders", 0, "not in a class folder"),
    ],
)
def test_a_picture_without_its_text_or_class_is_a_bad_row(make, names, format_name, bad, reason):
    folder = make(*names)
    rows = open_picture_folder(folder, format_name=format_name)
    rows[1 - bad]
    with pytest.raises(SampleError, match=reason) as caught:
        rows[bad]
    assert (caught.value.file, caught.value.line) == (str(folder), bad + 1)


def test_a_text_that_is_not_utf8_is_a_bad_row(make):
    folder = make("a.png", "a.txt")
    (folder / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SampleError, match="not UTF-8.*a.txt"):
        open_picture_folder(folder, format_name=None)[0]


@pytest.mark.parametrize(
    ("names", "format_name", "reason"),
    [
        (["notes.md"], None, "no picture in it"),
        (["a.png", "b.png"], None, "neither texts nor folders"),
        (["a.png", "cat/b.png"], None, "neither texts nor folders"),
        (["cat/a.png"], None, "all pictures are in one folder.*class_folders"),
        (["train/a.png", "test/b.png"], None, "folder of splits.*test"),
        (["metadata.csv", "a.png"], None, "holds data files.*metadata.csv"),
        (["cat/a.png", "dog/a.png"], "messages", "unknown kind.*format: messages"),
        (["a.md"], "image_text", "no picture in it"),
    ],
)
def test_a_folder_that_cannot_be_told_is_an_error(make, names, format_name, reason):
    with pytest.raises(VlmtuneError, match=reason):
        open_picture_folder(make(*names), format_name=format_name)


def test_one_class_or_splits_can_be_meant(make):
    folder = make("train/a.png")
    rows = open_picture_folder(folder, format_name="class_folders")
    assert rows[0] == {"image": "train/a.png", "label": "train"}


def test_what_is_not_used_is_counted(make, caplog):
    folder = make("cat/a.png", "dog/a.png", "dog/b.txt", ".hidden", ".git/a.png", "x.db", "LICENSE")
    (folder / "linked").symlink_to(folder / "cat")
    with caplog.at_level("INFO", logger="vlmtune"):
        assert len(open_picture_folder(folder, format_name=None)) == 2
    record = caplog.records[0]
    for count in (
        "hidden files (1)",
        "hidden folders (1)",
        "links to folders (1)",
        ".db (1)",
        "files without an extension (1)",
        "texts without a picture (1)",
    ):
        assert count in record.getMessage()


def test_the_classes_are_named_with_their_pictures(make, caplog):
    folder = make("cat/1.png", "cat/2.png", "dog/1.png", "dog/puppies/2.png", "dog/old/3.png")
    with caplog.at_level("INFO", logger="vlmtune"):
        open_picture_folder(folder, format_name=None)
    (record,) = caplog.records
    assert "2 classes: cat (2), dog (3); 2 pictures are in folders of" in record.getMessage()
    caplog.clear()
    with caplog.at_level("INFO", logger="vlmtune"):
        open_picture_folder(make("cat/1.txt"), format_name="image_text")
    assert "classes" not in caplog.text


def test_names_are_kept_as_the_system_has_them():
    names = ["a.png", "é😀", os.fsdecode(b"\xff"), ""]
    assert [Names(names)[n] for n in range(len(Names(names)))] == names
