"""A file that a row names: there, readable, an ordinary file, and below the row's folder."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from vlmtune.data.text import shorten
from vlmtune.errors import VlmtuneError

_SPECIAL = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
MAX_NAME_CHARACTERS = 4096
"""Longer ones are no paths; base64 is looked at as one first."""


class NoSuchFile(VlmtuneError):
    """Nothing has this name: it may be no name at all, but base64."""


def find_file(ref: str, *, base_dir: Path, allow_outside: bool, what: str = "picture") -> Path:
    """The file `ref`, relative to `base_dir`; nothing is opened. `what` it is, for messages.

    Raises NoSuchFile where there is nothing of this name, and VlmtuneError for what is no ordinary
    file with content, cannot be read, or is outside `base_dir` once links are followed.
    """
    path = os.path.join(base_dir, ref)
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreachable(error, path, base_dir, what) from error
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise _missing(path, base_dir, what, "no file name has such characters") from error
    if not allow_outside and not is_inside(path, base_dir):
        real = os.path.realpath(path)
        via = "" if real == os.path.abspath(path) else f", which is {printable(real)}"
        raise VlmtuneError(
            f"the {what} is outside the folder of its data",
            got=printable(ref) + via,
            expected=f"a file below {base_dir}",
            do="name its folder as the entry's image_dir, or allow it with "
            "data.allow_outside_paths: true (vlmtune eval: --allow-outside-paths)",
        )
    _check_kind(status, path, what)
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise _unreadable(what, path, os.strerror(errno.EACCES))
    return Path(path)


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is below `folder`, all symbolic links followed."""
    real, base = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, base]) == base


def printable(text: str, limit: int = 120) -> str:
    """`text` for a message: short, and without characters that a terminal obeys or refuses."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in shorten(text))
    return shorten("".join(shown), limit)


def _unreachable(error: OSError, path: str, base_dir: Path, what: str) -> VlmtuneError:
    if error.errno == errno.ELOOP:
        return VlmtuneError(
            f"the {what} is a symbolic link that leads in a circle", got=printable(path)
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if os.path.islink(path):
            return VlmtuneError(
                f"the {what} is a symbolic link to nothing",
                got=f"{printable(path)} -> {printable(os.readlink(path))}",
                do="bring back what it points to, or correct the link",
            )
        return _missing(path, base_dir, what, None)
    if error.errno == errno.ENAMETOOLONG:
        return _missing(path, base_dir, what, "too long for a file name")
    return _unreadable(what, path, error.strerror or str(error))


def _missing(path: str, base_dir: Path, what: str, reason: str | None) -> NoSuchFile:
    return NoSuchFile(
        f"no such {what} file" + (f": {reason}" if reason else ""),
        got=printable(path),
        expected=f"a file, relative to {base_dir}",
        do=_meant(path, base_dir)
        or "correct the path, or name the folder as the entry's image_dir; or skip such samples "
        "with data.on_bad_sample: skip",
    )


def _meant(path: str, base_dir: Path) -> str | None:
    """What to write where the file is there by a Windows path, or with its ending in other letters.

    Looks for a few names and lists no folder, which may be large.
    """
    if len(path) > MAX_NAME_CHARACTERS:
        return None
    name = os.path.relpath(path, base_dir)
    if "\\" in name:
        is_there = os.path.isfile(os.path.join(base_dir, name.replace("\\", "/")))
        better = f": {printable(name.replace(chr(92), '/'))}" if is_there else ""
        return f"write paths with / between folders, relative to the folder of the data{better}"
    stem, ending = os.path.splitext(name)
    for other in (ending.lower(), ending.upper()):
        if other != ending and os.path.isfile(os.path.join(base_dir, stem + other)):
            return f"write {printable(stem + other)}: capitals make a difference"
    return None


def _unreadable(what: str, path: str, reason: str) -> VlmtuneError:
    return VlmtuneError(f"the {what} file cannot be read ({reason})", got=printable(path))


def _check_kind(status: os.stat_result, path: str, what: str) -> None:
    expected = f"a {what} file"
    if stat.S_ISDIR(status.st_mode):
        raise VlmtuneError(f"the {what} is a folder", got=printable(path), expected=expected)
    for is_kind, kind in _SPECIAL:  # never opened: a pipe nobody writes to blocks for ever
        if is_kind(status.st_mode):
            raise VlmtuneError(
                f"the {what} is {kind}, not a file", got=printable(path), expected=expected
            )
    if status.st_size == 0:
        raise VlmtuneError(f"the {what} file is empty", got=printable(path))
