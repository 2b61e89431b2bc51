"""Files that others may read at any moment, digests, and what is kept from one run to the next.

    file    content -> unfinished file in the same folder -> fsync -> rename       whole_file
    folder  files -> unfinished folder in the same folder -> fsync all -> rename   whole_folder

Whoever opens the final name finds all of the old content or all of the new; of a folder, for a
moment, neither. Where the disk refuses (it is full, or not ours), OSError is raised, the old
content stays and nothing unfinished is left. A kill leaves an unfinished file or folder whose name
starts with `.writing-`, which nobody reads. Any number of processes may write one file at once (the
last rename counts); a folder is written by one process at a time, which first removes what an
earlier kill left of it.

    store   key -> value, in memory (MemoryStore) or on disk (DiskStore), bounded in bytes
    table   whole numbers in a file, mapped into memory (Table)
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt

from vlmtune.errors import VlmtuneError

logger = logging.getLogger("vlmtune")

WRITING = ".writing-"
"""How the name of an unfinished file or folder starts."""


@contextmanager
def whole_file(place: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file `place` when the block ends without an error.

    Missing folders are made. `sync=False` is for what a checksum guards: after a power cut the
    file may be damaged.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f"{WRITING}{os.urandom(8).hex()}")
    try:
        with unfinished.open("xb") as stream:
            yield stream
        finish_file(unfinished, place, sync=sync)
    finally:
        unfinished.unlink(missing_ok=True)


def write_file(place: Path, content: bytes | str, *, sync: bool = True) -> None:
    """Write a whole file. A text is written as UTF-8; half a surrogate pair, which JSON may hold,
    as its escape sequence."""
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    with whole_file(place, sync=sync) as stream:
        stream.write(content)


def finish_file(unfinished: Path, place: Path, *, sync: bool = True) -> None:
    """Give a file that is closed and complete its final name."""
    if sync:
        sync_path(unfinished)
    os.replace(unfinished, place)


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """An empty folder that becomes `place` when the block ends without an error. A folder that is
    there already is removed just before that: a kill may leave neither, but no part."""
    writing = place.with_name(f"{WRITING}{place.name}")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        yield writing
        sync_folder(writing)
        if place.exists():
            shutil.rmtree(place)
        writing.rename(place)
        sync_path(place.parent)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def sync_path(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for path in folder.rglob("*"):
        sync_path(path)
    sync_path(folder)


Content = bytes | str | Path | BinaryIO
"""What a digest is of: bytes, a text (as UTF-8), a file's content, or what a stream still holds."""


def digest(content: Content) -> str:
    """The SHA-256, as 64 hexadecimal digits."""
    return str(_hashed(content, hashlib.sha256).hexdigest())


def json_digest(value: Any) -> str:
    """The SHA-256 of `value` as JSON with sorted keys, as 64 hexadecimal digits."""
    return digest(json.dumps(value, sort_keys=True))


def short_digest(content: Content) -> int:
    """A digest of 64 bits, for telling a million things apart in little memory."""
    hashed = _hashed(content, functools.partial(hashlib.blake2b, digest_size=8))
    return int.from_bytes(hashed.digest(), "little")


def file_state(path: Path) -> tuple[str, int, int]:
    """Absolute path, size and time of change in ns: what tells a file from a changed one."""
    status = path.stat()
    return os.path.abspath(path), status.st_size, status.st_mtime_ns


def _hashed(content: Content, algorithm: Callable[..., Any]) -> Any:
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    if isinstance(content, bytes):
        return algorithm(content)
    if isinstance(content, Path):
        with content.open("rb") as stream:
            return hashlib.file_digest(stream, algorithm)
    return hashlib.file_digest(cast(Any, content), algorithm)


Value = TypeVar("Value")


@dataclass
class MemoryStore(Generic[Value]):
    """Values in this process, up to `max_bytes` by `size_of`.

    A value's key is a hexadecimal digest of all that it depends on. A full store takes nothing
    more, or with `drops_oldest` lets go of what was used longest ago.
    """

    max_bytes: int
    size_of: Callable[[Value], int]
    drops_oldest: bool = False
    num_bytes: int = 0
    _kept: OrderedDict[str, Value] = field(default_factory=OrderedDict, repr=False)

    def get(self, key: str) -> Value | None:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        return found

    def make_room(self, num_bytes: int) -> bool:
        """Whether so many bytes more are taken."""
        while self.drops_oldest and num_bytes <= self.max_bytes < self.num_bytes + num_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= self.size_of(oldest)
        return self.num_bytes + num_bytes <= self.max_bytes

    def put(self, key: str, value: Value) -> bool:
        """Whether the value is kept now."""
        num_bytes = self.size_of(value)
        if not self.make_room(num_bytes):
            return False
        self._kept[key] = value
        self.num_bytes += num_bytes
        return True


_REMOVING = ".removing-"
_ENTRY = struct.Struct("<4sI")  # magic, CRC-32 of the rest
_ENTRY_MAGIC = b"vlm1"


@dataclass
class DiskStore(Generic[Value]):
    """As `MemoryStore`, in files folder/ab/ab…: a checksum, and what `encode` makes of the value.

    Any number of processes may share a folder; with one `encode` and `decode` of module level the
    store pickles into workers. A damaged entry is found by its checksum and made anew. Where
    entries cannot be written (a full disk) or opened (somebody else's), that is said once in each
    process, which goes on without. `what` the values are, for messages.

    This process writes up to `max_bytes`; more where `others`, folders with their sizes, give way,
    first those used longest ago. A full store takes nothing more.
    """

    folder: Path
    what: str
    encode: Callable[[Value], bytes]
    decode: Callable[[bytes], Value]
    max_bytes: int = sys.maxsize
    others: list[tuple[Path, int]] = field(default_factory=list)
    num_bytes: int = 0
    is_writable: bool = True
    is_readable: bool = True

    def place(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def get(self, key: str) -> Value | None:
        if not self.is_readable:
            return None
        try:
            with self.place(key).open("rb", buffering=0) as stream:
                start, content = stream.read(_ENTRY.size), stream.readall()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.is_readable = False
            reason = error.strerror or error
            logger.warning(
                "cached %s cannot be read (%s: %s); they are made again",
                self.what,
                self.folder,
                reason,
            )
            return None
        if start != _start(content):
            logger.warning("the cache entry %s is damaged; it is made again", self.place(key))
            return None
        return self.decode(content)

    def make_room(self, num_bytes: int) -> bool:
        while self.num_bytes + num_bytes > self.max_bytes and self.others:
            oldest, freed = self.others.pop(0)
            if _remove(oldest):
                self.max_bytes += freed
        return self.is_writable and self.num_bytes + num_bytes <= self.max_bytes

    def put(self, key: str, value: Value) -> bool:
        if not self.is_writable:
            return False
        content = self.encode(value)
        if not self.make_room(_ENTRY.size + len(content)):
            return False
        try:
            with whole_file(self.place(key), sync=False) as stream:
                stream.write(_start(content))
                stream.write(content)
        except OSError as error:
            self.stop_writing(error)
            return False
        self.num_bytes += _ENTRY.size + len(content)
        return True

    def stop_writing(self, error: OSError) -> None:
        """Write nothing more, and say why."""
        self.is_writable = False
        reason = error.strerror or error
        logger.warning("no more %s are cached on disk (%s: %s)", self.what, self.folder, reason)


def _start(content: bytes) -> bytes:
    return _ENTRY.pack(_ENTRY_MAGIC, zlib.crc32(content))


def _remove(folder: Path) -> bool:
    """Whether this process did: of several only one may use the room. A folder cannot be moved
    twice, whereas two may see it while one of them removes it."""
    removing = folder.with_name(f"{_REMOVING}{folder.name}")
    try:
        folder.rename(removing)
    except OSError:  # another was faster, or it is not ours to remove
        return False
    shutil.rmtree(removing, ignore_errors=True)
    return True


MAPPED_FROM_BYTES = 1 << 20
"""Smaller tables are read into memory: each one that is mapped holds a file open."""

Numbers = npt.NDArray[np.int64]
Extra = dict[str, Any]
Build = Callable[[Extra], Iterable[Numbers]]
"""Gives a table in pieces of shape (n, columns), and may add JSON values to what it is given."""

_TABLE = struct.Struct("<8s32sqqq")  # magic, key, rows, columns, bytes of `extra` at the end
_TABLE_MAGIC = b"vlmindex"


class Table:
    """Whole numbers of shape (rows, columns), and `extra`: what else is known.

    A large one is mapped from its file, so that it costs no memory, and workers map it anew.
    """

    def __init__(
        self, values: Numbers, extra: Extra, *, file: Path | None = None, key: bytes = b""
    ) -> None:
        self.values = values  # (rows, columns)
        self.extra = extra
        self._file = file
        self._key = key

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def row(self, index: int) -> list[int]:
        """The numbers of row `index` (0-based)."""
        return [int(value) for value in self.values[index]]

    def __reduce__(self) -> tuple[Callable[..., Table], tuple[Any, ...]]:
        if isinstance(self.values, np.memmap):
            return _map_again, (self._file, self._key)
        return Table, (self.values, self.extra)


def build_table(build: Build, *, columns: int) -> Table:
    """The table in memory."""
    extra: Extra = {}
    return Table(np.concatenate([np.empty((0, columns), np.int64), *build(extra)]), extra)


def write_table(place: Path, key: bytes, build: Build, *, columns: int) -> None:
    """Write the table piece by piece. `key`: a SHA-256 of what it depends on."""
    extra: Extra = {}
    rows = 0
    with whole_file(place) as stream:
        stream.write(bytes(_TABLE.size))
        for piece in build(extra):
            stream.write(np.ascontiguousarray(piece, dtype="<i8").data)
            rows += len(piece)
        tail = json.dumps(extra).encode()
        stream.write(tail)
        stream.seek(0)
        stream.write(_TABLE.pack(_TABLE_MAGIC, key, rows, columns, len(tail)))


def load_table(place: Path, key: bytes) -> Table | None:
    """The table at `place`, or None where there is none, or not the whole one of `key`."""
    try:
        with place.open("rb") as stream:
            header = stream.read(_TABLE.size)
            size = os.fstat(stream.fileno()).st_size
            if len(header) < _TABLE.size:
                return None
            magic, found, rows, columns, num_extra = _TABLE.unpack(header)
            num_bytes = rows * columns * 8
            if (magic, found, size) != (_TABLE_MAGIC, key, _TABLE.size + num_bytes + num_extra):
                return None
            stream.seek(_TABLE.size + num_bytes)
            extra = json.loads(stream.read(num_extra))
            shape = (rows, columns)
            if num_bytes >= MAPPED_FROM_BYTES:
                mapped = np.memmap(stream, "<i8", mode="r", offset=_TABLE.size, shape=shape)
                return Table(mapped, extra, file=place, key=key)
            stream.seek(_TABLE.size)
            return Table(np.frombuffer(stream.read(num_bytes), "<i8").reshape(shape), extra)
    except OSError:
        return None


def _map_again(place: Path, key: bytes) -> Table:
    table = load_table(place, key)
    if table is None:
        raise VlmtuneError(
            "the index was removed or replaced after it was opened",
            file=place,
            do="start again",
        )
    return table
