"""Digests of entries: of what is in a file, whichever way it was come by."""

from __future__ import annotations

import hashlib
import os

import pytest

from vlmtune.data.dataset import content_hash
from vlmtune.data.sources import base
from vlmtune.data.sources.registry import digests_of
from vlmtune.errors import VlmtuneError
from vlmtune.recipe.data_section import DataEntry


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_digest_is_of_the_bytes_and_kept_for_the_next_time(
    tmp_path, cache_dir, always_kept, monkeypatch
):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"abc" * 1000)
    entry = DataEntry(path=str(path))
    assert digests_of(entry, cache_dir=cache_dir) == {str(path): _sha(b"abc" * 1000)}

    def not_again(*args):
        raise AssertionError("the file was read again")

    with monkeypatch.context() as patch:
        patch.setattr("vlmtune.data.sources.registry.digest", not_again)
        assert digests_of(entry, cache_dir=cache_dir) == {str(path): _sha(b"abc" * 1000)}
        path.write_bytes(b"abd" * 1001)
        with pytest.raises(AssertionError, match="read again"):
            digests_of(entry, cache_dir=cache_dir)
    assert digests_of(entry, cache_dir=cache_dir) == {str(path): _sha(b"abd" * 1001)}
    assert base.KEPT_FROM_BYTES == 1


def test_shards_and_files_of_answers_have_digests_of_their_own(tmp_path, cache_dir):
    names = [tmp_path / f"{n}.json" for n in range(3)]
    for path in names:
        path.write_text(path.name)
    entries = [
        DataEntry(path=str(tmp_path / "{0..1}.json")),
        DataEntry(path=str(names[0]), annotations=str(names[2])),
    ]
    expected = {str(path): _sha(path.name.encode()) for path in names}
    assert content_hash(entries, cache_dir=cache_dir) == expected


def test_a_folders_digest_changes_with_what_is_in_it(tmp_path, cache_dir):
    folder = tmp_path / "folder"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "a.png").write_bytes(b"a")

    def digest() -> str:
        (found,) = digests_of(DataEntry(path=str(folder)), cache_dir=cache_dir).values()
        return found

    seen = {digest()}
    assert digest() in seen
    (folder / "cat" / "b.png").write_bytes(b"b")
    seen.add(digest())
    (folder / "cat" / "b.png").rename(folder / "b.png")
    seen.add(digest())
    os.utime(folder / "b.png", ns=(0, 0))
    seen.add(digest())
    assert len(seen) == 4


def test_a_missing_file_is_named(tmp_path, cache_dir):
    with pytest.raises(VlmtuneError, match="no such data file"):
        digests_of(DataEntry(path=str(tmp_path / "a")), cache_dir=cache_dir)
