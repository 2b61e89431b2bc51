"""Files are there as a whole or not at all; stores find damage, share a folder and keep a bound."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlmtune import files
from vlmtune.files import (
    DiskStore,
    MemoryStore,
    digest,
    file_state,
    json_digest,
    short_digest,
    whole_file,
    whole_folder,
    write_file,
)


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of an earlier test may have turned this off."""
    monkeypatch.setattr(logging.getLogger("vlmtune"), "propagate", True)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file grows beyond 1,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NEW = b"new" * 100_000

KILLED = """
import os, signal, sys
from pathlib import Path
from vlmtune import files

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def in_place(place, content):
    with place.open("wb") as stream:
        stream.write(content[: len(content) // 2])
        stream.flush()
        die()

def folder(place, content):
    with files.whole_folder(place) as writing:
        (writing / "a").write_bytes(content)
        (writing / "b").write_bytes(content)

def folder_in_place(place, content):
    (place / "a").write_bytes(content)
    die()

way, moment, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
setattr(Path if moment == "rename" else os, moment, die)
{"file": files.write_file, "folder": folder, "in place": in_place,
 "folder in place": folder_in_place}[way](place, b"new" * 100_000)
"""


@pytest.mark.parametrize(
    ("way", "moment", "expected"),
    [
        ("file", "fsync", {b"old"}),
        ("file", "replace", {b"old"}),  # written, and killed before it is renamed
        ("folder", "fsync", {b"old"}),
        ("folder", "rename", set()),  # the old one is removed just before
        ("in place", "replace", {NEW[: len(NEW) // 2]}),  # the wrong variants
        ("folder in place", "rename", {NEW, b"old"}),
    ],
)
def test_a_kill_leaves_no_part(way: str, moment: str, expected: set[bytes], tmp_path: Path):
    place = tmp_path / "place"
    if "folder" in way:
        place.mkdir()
        for name in "ab":
            (place / name).write_bytes(b"old")
    else:
        place.write_bytes(b"old")
    command = [sys.executable, "-c", KILLED, way, moment, str(place)]
    assert subprocess.run(command, env=os.environ, timeout=120).returncode == -signal.SIGKILL
    found = [path for path in [place, *place.rglob("*")] if path.is_file()]
    assert {path.read_bytes() for path in found} == expected
    left = [path.name for path in tmp_path.iterdir() if path != place]
    assert all(name.startswith(".writing-") for name in left)
    assert len(left) == ("in place" not in way)
    if "folder" in way:
        with whole_folder(place) as writing:
            (writing / "a").write_bytes(NEW)
        assert [path.name for path in tmp_path.rglob("*")] == ["place", "a"]
    else:
        write_file(place, NEW)
        assert place.read_bytes() == NEW


def test_a_full_disk_leaves_the_old_content_and_no_part(tmp_path: Path, full_disk: None):
    place, folder = tmp_path / "deep" / "place", tmp_path / "folder"
    write_file(place, b"old")
    with whole_folder(folder) as writing:
        (writing / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="too large"):
        write_file(place, NEW)
    with pytest.raises(OSError, match="too large"), whole_folder(folder) as writing:
        (writing / "a").write_bytes(NEW)
    assert place.read_bytes() == b"old" == (folder / "a").read_bytes()
    assert len(list(tmp_path.rglob("*"))) == 4


def test_an_error_in_the_block_leaves_the_old_content(tmp_path: Path):
    place = tmp_path / "place"
    write_file(place, b"old")
    with pytest.raises(ZeroDivisionError), whole_file(place) as stream:
        stream.write(b"new")
        _ = 1 / 0
    assert place.read_bytes() == b"old" and list(tmp_path.iterdir()) == [place]


def test_a_text_is_utf_8_and_half_a_surrogate_pair_its_escape(tmp_path: Path):
    write_file(tmp_path / "a", "zwölf\ud83d\r\n")
    assert (tmp_path / "a").read_bytes() == "zwölf\\ud83d\r\n".encode()


def test_digests_are_those_of_the_content_in_whatever_form(tmp_path: Path):
    (tmp_path / "a").write_bytes("zwölf".encode())
    expected = hashlib.sha256("zwölf".encode()).hexdigest()
    forms = ("zwölf", "zwölf".encode(), tmp_path / "a")
    assert {digest(form) for form in (*forms, io.BytesIO("zwölf".encode()))} == {expected}
    assert len({short_digest(form) for form in forms}) == 1 and short_digest("a") < 2**64
    assert digest("zwölf ") != expected and short_digest("a") != short_digest("b")
    assert len(digest("\ud83d")) == 64
    assert json_digest({"a": 1, "b": (2,)}) == json_digest({"b": [2], "a": 1})
    assert json_digest({"a": 1}) != json_digest({"a": "1"})


def test_the_state_of_a_file_changes_with_its_size_and_its_time(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"x")
    states = {file_state(path)}
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    states.add(file_state(path))
    path.write_bytes(b"xy")
    assert len(states | {file_state(path)}) == 3


KEY = "ab" * 32


def key(number: int) -> str:
    return f"{number:064x}"


def store_in(folder: Path, **options: object) -> DiskStore[str]:
    return DiskStore(folder, "texts", str.encode, bytes.decode, **options)


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_put_on_disk_comes_back_also_in_another_process(tmp_path: Path):
    store = store_in(tmp_path / "store")
    assert store.get(KEY) is None and not list(tmp_path.iterdir())
    assert store.put(KEY, "zwölf") and store.put(key(1), "")
    for other in (store, pickle.loads(pickle.dumps(store)), store_in(tmp_path / "store")):
        assert other.get(KEY) == "zwölf" and other.get(key(1)) == "" and other.get(key(2)) is None


def _flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:5],
        lambda content: b"",
        lambda content: bytes(len(content)),
        lambda content: content + b"x",
        lambda content: b"another file" * 10,
        _flipped,
    ],
)
def test_a_damaged_entry_is_made_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
):
    store = store_in(tmp_path)
    store.put(KEY, "a value of some length")
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert store.get(KEY) is None
    assert "is made again" in caplog.text
    assert store.put(KEY, "a value of some length")
    assert path.read_bytes() == whole and store.get(KEY) == "a value of some length"


def test_without_the_checksum_a_damaged_entry_would_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The wrong variant."""
    store = store_in(tmp_path)
    store.put(KEY, "a value of some length")
    (path,) = entries(tmp_path)
    path.write_bytes(_flipped(path.read_bytes()))
    monkeypatch.setattr(files, "_start", lambda content: path.read_bytes()[:8])
    assert store.get(KEY) not in (None, "a value of some length")


def test_where_nothing_can_be_written_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("no folder")
    store = store_in(tmp_path / "file")
    for _ in range(3):
        assert store.get(KEY) is None and not store.put(KEY, "a")
    assert not store.make_room(1)
    (record,) = caplog.records
    assert "no more texts are cached on disk" in record.getMessage()


def test_where_nothing_can_be_opened_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    store = store_in(tmp_path)
    store.place(KEY).mkdir(parents=True)  # whoever may read anything cannot read this
    for _ in range(3):
        assert store.get(KEY) is None
    (record,) = caplog.records
    assert "cached texts cannot be read" in record.getMessage()


def test_on_a_full_disk_what_is_kept_is_still_used(
    tmp_path: Path, full_disk: None, caplog: pytest.LogCaptureFixture
):
    store = store_in(tmp_path)
    assert store.put(key(1), "small")
    assert not store.put(key(2), "x" * 2000)
    assert not store.put(key(3), "small")
    assert store.get(key(1)) == "small" and len(entries(tmp_path)) == 1
    assert caplog.text.count("no more texts are cached") == 1 and "too large" in caplog.text


WRITER = """
import sys
from pathlib import Path
from vlmtune.files import DiskStore
store = DiskStore(Path(sys.argv[1]), "texts", str.encode, bytes.decode)
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    key = f"{number % 50:064x}"
    if number % 2 or store.get(key) is None:
        assert store.put(key, str(number % 50) * 100_000)
"""


def test_processes_share_a_folder_and_a_kill_leaves_it_usable(tmp_path: Path):
    def writer(first: int, last: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(first), str(last)]
        return subprocess.Popen(command, env=os.environ)

    endless = [writer(0, 10**9), writer(7, 10**9)]
    assert writer(20, 500).wait(timeout=120) == 0
    time.sleep(0.1)
    for process in endless:
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    store = store_in(tmp_path)
    assert all(store.get(key(n)) == str(n) * 100_000 for n in range(50))
    assert store.put(key(1), "over")


def test_a_store_on_disk_keeps_its_bound(tmp_path: Path):
    store = store_in(tmp_path, max_bytes=100)
    kept = [store.put(key(n), "x" * 20) for n in range(5)]
    assert kept == [True, True, True, False, False]
    assert sum(path.stat().st_size for path in entries(tmp_path)) == store.num_bytes == 3 * 28
    assert not store.make_room(17) and store.make_room(16)


@pytest.mark.parametrize(("drops_oldest", "kept"), [(False, "abc"), (True, "ade")])
def test_a_store_in_memory_keeps_its_bound(drops_oldest: bool, kept: str):
    store: MemoryStore[str] = MemoryStore(3, len, drops_oldest)
    for name in "abc":
        assert store.get(name) is None and store.put(name, name)
    for name in "de":
        assert store.get("a") == "a"  # what was used longest ago is another
        assert store.put(name, name) == drops_oldest
    assert not store.put("f", "ffff")
    assert "".join(name for name in "abcdef" if store.get(name)) == kept
    assert store.num_bytes == 3
