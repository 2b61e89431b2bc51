"""The cache of indexes: used where it is right, made anew where it is not."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest

from vlmtune import files
from vlmtune.data.sources import base
from vlmtune.data.sources.base import open_table, stamp_of
from vlmtune.errors import VlmtuneError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "KEPT_FROM_BYTES", 1)
    monkeypatch.setattr(files, "MAPPED_FROM_BYTES", 1)
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data"
    path.write_text("content")
    return path


class Counted:
    """A build that counts its calls; the table says which call it is of."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, extra):
        self.calls += 1
        extra["call"] = self.calls
        yield np.array([[1, 2], [3, 4]])
        yield np.array([[5, self.calls]])


def _open(file, build, cache, kind="kind"):
    return open_table(kind, [(file, stamp_of(file))], columns=2, build=build, cache_dir=cache)


def test_a_table_is_built_once_and_then_read(file, cache):
    build = Counted()
    for _ in range(3):
        table = _open(file, build, cache)
        assert table.values.tolist() == [[1, 2], [3, 4], [5, 1]]
        assert (len(table), table.row(1), table.extra) == (3, [3, 4], {"call": 1})
    assert build.calls == 1
    assert len(list((cache / "index").iterdir())) == 1


def test_another_kind_of_table_of_the_same_file_is_another(file, cache):
    build = Counted()
    _open(file, build, cache)
    assert _open(file, build, cache, kind="other").extra == {"call": 2}


def test_an_index_of_an_earlier_state_is_replaced(file, cache):
    build = Counted()
    _open(file, build, cache)
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert _open(file, build, cache).extra == {"call": 2}
    file.write_text("content and more")
    assert _open(file, build, cache).extra == {"call": 3}
    assert len(list((cache / "index").iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:30],
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: content + b"x",
        lambda content: content[:10] + b"\0" + content[11:],
    ],
)
def test_a_damaged_index_is_made_anew(file, cache, damage):
    build = Counted()
    _open(file, build, cache)
    (kept,) = (cache / "index").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert _open(file, build, cache).extra == {"call": 2}
    assert _open(file, build, cache).extra == {"call": 2}


def test_the_index_of_another_file_under_this_ones_name_is_not_used(file, cache, tmp_path):
    other = tmp_path / "other"
    other.write_text("content")
    build = Counted()
    _open(file, build, cache)
    (kept,) = (cache / "index").iterdir()
    _open(other, build, cache)
    (foreign,) = set((cache / "index").iterdir()) - {kept}
    os.replace(foreign, kept)
    assert _open(file, build, cache).extra == {"call": 3}


def test_a_cache_that_cannot_be_written_to_is_said_once(file, cache, caplog):
    cache.write_text("a file where the folder should be")
    build = Counted()
    with caplog.at_level(logging.INFO, logger="vlmtune"):
        for _ in range(2):
            assert _open(file, build, cache).values.tolist()[:2] == [[1, 2], [3, 4]]
    assert build.calls == 2
    (record,) = caplog.records
    assert str(cache) in record.getMessage() and "stay in memory" in record.getMessage()


def test_a_build_that_fails_leaves_nothing_behind(file, cache):
    def build(extra):
        yield np.array([[1, 2]])
        raise VlmtuneError("broken")

    with pytest.raises(VlmtuneError, match="broken"):
        _open(file, build, cache)
    assert list((cache / "index").iterdir()) == []


def test_a_file_that_changes_while_it_is_looked_through_is_an_error(file, cache):
    def build(extra):
        yield np.array([[1, 2]])
        file.write_text("longer content")

    with pytest.raises(VlmtuneError, match="has changed"):
        _open(file, build, cache)


def test_small_files_leave_nothing_in_the_cache(file, tmp_path):
    build = Counted()
    for _ in range(2):
        _open(file, build, tmp_path / "cache")
    assert build.calls == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such data file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "no regular file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
)
def test_what_is_no_file_is_named_and_not_opened(tmp_path, make, reason):
    path = tmp_path / "odd"
    make(path)
    with pytest.raises(VlmtuneError, match=reason) as caught:
        stamp_of(path)
    assert caught.value.file == str(path)


def test_a_stamp_is_json(file):
    assert json.loads(json.dumps(stamp_of(file)))[0] == str(file)
