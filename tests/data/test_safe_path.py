"""A file that a row names is below the row's folder, ordinary and readable, or it is refused."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from vlmtune.data.locations import NoSuchFile, find_file, is_inside, printable
from vlmtune.errors import VlmtuneError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """`data/a.png`, `data/sub/b.png`, and `outside.png` and `database/c.png` beside the folder."""
    for name in ("data/a.png", "data/sub/b.png", "outside.png", "database/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    return tmp_path / "data"


def _find(ref: str | Path, folder: Path, *, allow_outside: bool = False) -> Path:
    return find_file(str(ref), base_dir=folder, allow_outside=allow_outside)


def test_files_below_the_folder_are_found(data):
    for ref in ("a.png", "./a.png", "sub/b.png", "sub/../a.png", data / "a.png"):
        assert _find(ref, data).read_bytes() == b"content"


def test_a_folder_named_relative_to_the_working_directory_is_the_same(data, monkeypatch):
    monkeypatch.chdir(data.parent)
    assert _find("a.png", Path("data")).is_file()
    monkeypatch.chdir(data)
    assert _find("sub/b.png", Path(".")).is_file()
    with pytest.raises(VlmtuneError, match="outside"):
        _find("../outside.png", Path("."))


@pytest.mark.parametrize(
    "ref", ["../outside.png", "sub/../../outside.png", "../database/c.png", "{above}/outside.png"]
)
def test_paths_that_leave_the_folder_are_refused_unless_allowed(ref, data):
    ref = ref.format(above=data.parent)
    with pytest.raises(VlmtuneError, match="outside the folder") as caught:
        _find(ref, data)
    assert "data.allow_outside_paths: true" in str(caught.value)
    assert "image_dir" in str(caught.value)
    assert _find(ref, data, allow_outside=True).read_bytes() == b"content"


@pytest.mark.parametrize(
    ("ref", "hint"),
    [
        ("sub\\b.png", "relative to the folder of the data: sub/b.png"),
        ("C:\\me\\b.png", "write paths with / between folders, relative to the folder of the data"),
        ("a.PNG", "write a.png: upper and lower case differ"),
        ("sub/b.Png", "write sub/b.png: upper"),
        ("b.png", "image_dir; or skip such samples"),
        ("b", "image_dir; or skip such samples"),
    ],
)
def test_a_missing_file_says_what_may_be_meant(ref, hint, data):
    with pytest.raises(NoSuchFile) as caught:
        _find(ref, data)
    assert caught.value.do is not None and hint in caught.value.do


def test_a_symbolic_link_is_judged_by_where_it_leads(data):
    os.symlink("sub/b.png", data / "inside.png")
    os.symlink(data.parent / "outside.png", data / "leaves.png")
    os.symlink(data.parent, data / "up")
    assert _find("inside.png", data).read_bytes() == b"content"
    for ref in ("leaves.png", "up/outside.png"):
        with pytest.raises(VlmtuneError, match=f"outside.*{ref}, which is .*/outside.png"):
            _find(ref, data)
        assert _find(ref, data, allow_outside=True).read_bytes() == b"content"
    assert _find("up/data/a.png", data).read_bytes() == b"content"  # and comes back


def test_a_folder_that_is_a_link_itself_holds_its_files(data):
    os.symlink(data, data.parent / "link")
    assert _find("a.png", data.parent / "link").is_file()
    assert _find(data / "a.png", data.parent / "link").is_file()


def test_links_to_nothing_and_in_a_circle_are_named(data):
    os.symlink("gone.png", data / "broken.png")
    os.symlink("circle.png", data / "circle.png")
    with pytest.raises(VlmtuneError, match="broken symbolic link.*-> gone.png"):
        _find("broken.png", data)
    with pytest.raises(VlmtuneError, match="circular symbolic link"):
        _find("circle.png", data)


def test_what_is_no_ordinary_file_is_refused_without_opening_it(data, monkeypatch):
    os.mkfifo(data / "pipe.png")  # opening it would never end
    monkeypatch.chdir(data)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        (data / "empty.png").touch()
        for ref, reason in (
            ("pipe.png", "is a named pipe, not a file"),
            ("socket.png", "is a socket, not a file"),
            ("sub", "is a folder"),
            (".", "is a folder"),
            ("empty.png", "file is empty"),
        ):
            with pytest.raises(VlmtuneError, match=reason):
                _find(ref, data)
    with pytest.raises(VlmtuneError, match="is a device, not a file"):
        _find("/dev/zero", data, allow_outside=True)
    with pytest.raises(VlmtuneError, match="outside"):
        _find("/dev/zero", data)


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("gone.png", "no such picture file"),
        ("a.png/b.png", "no such picture file"),
        ("/nowhere/at/all.png", "no such picture file"),
        ("zero\0byte.png", "no file name has such characters"),
        ("half\ud83d.png", "no file name has such characters"),
        ("long" * 100, "too long for a file name"),
        ("deep/" * 3000, "too long for a file name"),
    ],
)
def test_what_is_not_there_is_told_from_what_may_not_be_read(ref, reason, data):
    with pytest.raises(NoSuchFile, match=reason) as caught:
        _find(ref, data)
    assert len(str(caught.value).encode()) < 1000
    with pytest.raises(NoSuchFile):
        _find(ref, data, allow_outside=True)


def test_files_without_permission_are_refused(data):
    (data / "locked").mkdir()
    (data / "locked" / "a.png").write_bytes(b"content")
    (data / "secret.png").write_bytes(b"content")
    (data / "secret.png").chmod(0)
    (data / "locked").chmod(0)
    was_root = os.geteuid() == 0
    modes = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in (data, *data.parents)}
    closed = [folder for folder, mode in modes.items() if not mode & stat.S_IXOTH]
    try:
        if was_root:  # whom nothing stops: as nobody, who must get as far as the folder
            for folder in closed:
                folder.chmod(modes[folder] | 0o711)
            os.seteuid(65534)
        assert _find("a.png", data).is_file()
        for ref in ("secret.png", "locked/a.png"):
            with pytest.raises(VlmtuneError, match=r"cannot be read \(Permission denied\)"):
                _find(ref, data)
    finally:
        if was_root:
            os.seteuid(0)
            for folder in closed:
                folder.chmod(modes[folder])
        (data / "locked").chmod(0o700)


def test_a_folder_with_a_longer_name_is_not_inside(data):
    assert is_inside(data / "sub" / "b.png", data)
    assert is_inside(data, data)
    assert not is_inside(data.parent / "database" / "c.png", data)
    assert is_inside(data, "/")


def test_names_in_messages_hold_nothing_that_a_terminal_obeys():
    assert printable("a\x1b[31m\n\0\ud800b") == "a\\x1b[31m\\n\\x00\\ud800b"
    assert printable("ünï 図.png") == "ünï 図.png"
    assert len(printable("\0" * 500)) == 119
