"""JSON files that are an array of objects, or an object around lists of objects (COCO, VQAv2).

Offsets are in bytes, lines are 1-based. Every fault is a SampleError at its line.

file -> table of the items of its known lists (start, end, key to join by, list), and the names
  -> items of the only list | COCO: captions joined with pictures | VQAv2: questions and answers
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmtune.data.sources.base import (
    SpanRows,
    Stamp,
    in_pieces,
    open_table,
    read_chunks,
    stamp_of,
)
from vlmtune.data.sources.json_text import BOM, load_json, parse_line, reason
from vlmtune.errors import SampleError, VlmtuneError
from vlmtune.files import Extra, Numbers, Table, short_digest

CHUNK_BYTES = 1 << 20

_BLANKS = re.compile(r"[ \t\n\r]*")
_CUT_WINDOW = 32
"""A value that is cut off by the end of a chunk is found faulty at most so near to it, a text
without an end excepted."""


class Item(NamedTuple):
    """A value and where it stands."""

    value: Any
    start: int
    end: int


class JsonScanner:
    """A place in a JSON text that only moves forward."""

    def __init__(self, chunks: Iterator[bytes], file: Path) -> None:
        self._chunks = chunks
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._at = "", 0
        self._offset, self._line = 0, 1  # of _text[_at]
        self._is_complete = False  # whether _text reaches the end of the file
        first = next(self._chunks, b"")
        if first.startswith(BOM):
            self._offset = len(BOM)
        self._append(first.removeprefix(BOM))

    def peek(self) -> str:
        """The next character that is not blank, which the place moves to; "" at the end."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            assert blanks is not None
            self._move(blanks.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if self._is_complete:
                return ""
            self._fill()

    def take(self, expected: str) -> None:
        """Move past the character `expected`. Raises SampleError where another stands there."""
        if self.peek() != expected:
            raise self._fault(f"Expecting {expected!r}", self._at)
        self._move(self._at + 1)

    def value(self) -> Item:
        """Read the next value and move past it. Raises SampleError where there is none."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string")
                is_cut = is_cut or error.pos >= len(self._text) - _CUT_WINDOW
                if self._is_complete or not is_cut:
                    raise self._fault(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self._fault(reason(error), self._at) from error
            else:
                # "0." and "1e+" are read as 0 and 1 where the text ends there.
                ahead = 3 if isinstance(value, (int, float)) else 0
                if end + ahead < len(self._text) or self._is_complete:
                    break
            self._fill()
        text, start = self._text[self._at : end], self._offset
        if not isinstance(value, (dict, list, str)):
            self._check_scalar(text)
        self._move(end)
        return Item(value, start, self._offset)

    def items(self) -> Iterator[Item]:
        """The values of an array, which the place moves past."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.peek() == "]":
                self.take("]")
                return
            self.take(",")

    def members(self) -> Iterator[str]:
        """The keys of an object. The caller moves past each value before asking for the next."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                raise self._fault("Expecting a key in double quotes", self._at)
            yield self.value().value
            if self.peek() == "}":
                self.take("}")
                return
            self.take(",")

    def check_end(self) -> None:
        """Raises SampleError where something but blanks follows."""
        if self.peek():
            raise self._fault("Extra data", self._at)

    def _check_scalar(self, text: str) -> None:
        try:
            load_json(text.encode())
        except ValueError as error:
            raise self._fault(str(error), self._at) from error

    def _move(self, end: int) -> None:
        passed = self._text[self._at : end]
        self._offset += len(passed) if passed.isascii() else len(passed.encode())
        self._line += passed.count("\n")
        self._at = end

    def _fill(self) -> None:
        """Read at least as much again as is at hand: a long value is not begun too often."""
        self._text, self._at = self._text[self._at :], 0
        pieces, wanted = [], max(1, len(self._text))
        while wanted > 0 and not self._is_complete:
            chunk = next(self._chunks, b"")
            pieces.append(chunk)
            wanted -= len(chunk)
            self._is_complete = not chunk
        self._append(b"".join(pieces))

    def _append(self, content: bytes) -> None:
        try:
            self._text += self._decoder.decode(content, final=self._is_complete)
        except UnicodeDecodeError as error:
            before = self._text.count("\n", self._at) + error.object.count(b"\n", 0, error.start)
            raise SampleError(
                "the file is not UTF-8",
                file=self._file,
                line=self._line + before,
                do="save the file as UTF-8",
            ) from error

    def _fault(self, what: str, at: int) -> SampleError:
        line = self._line + self._text.count("\n", self._at, at)
        offset = self._offset + len(self._text[self._at : at].encode())
        return SampleError(f"not JSON ({what}, byte {offset + 1})", file=self._file, line=line)


def open_json_array(path: Path, *, cache_dir: Path) -> SpanRows:
    """Raises SampleError where the file is no JSON, VlmtuneError where it cannot be read."""
    files = ((path, stamp_of(path)),)
    table = open_table(
        "array",
        files,
        columns=2,
        build=lambda extra: in_pieces(_scan_array(path), columns=2),
        cache_dir=cache_dir,
    )
    return SpanRows(files, table, parse_line)


def _scan_array(path: Path) -> Iterator[tuple[int, int]]:
    scanner = JsonScanner(read_chunks(path, CHUNK_BYTES), path)
    for item in scanner.items():
        yield item.start, item.end
    scanner.check_end()


LISTS = ("images", "annotations", "questions", "data", "samples", "examples", "rows", "items")
NO_KEY = -(2**63)
"""Stands for a missing id, or one that is neither a whole number nor a text."""

_JOINED_BY = {"images": "id", "annotations": "image_id", "questions": "question_id"}
_ROW_KEYS = frozenset({"messages", "conversations"})
_KEPT_TEXTS = ("data_type", "data_subtype")


@dataclass(frozen=True)
class Container:
    """A file's `table`: the start, the end and the key of each item, and its list's number in
    LISTS."""

    path: Path
    stamp: Stamp
    table: Table

    @property
    def opened(self) -> tuple[Path, Stamp]:
        """What `SpanRows` reads from."""
        return self.path, self.stamp

    @property
    def lists(self) -> dict[str, int]:
        """The known lists of objects that the file has, with their lengths."""
        found: dict[str, int] = self.table.extra["lists"]
        return found

    def text(self, name: str) -> str | None:
        """The text that the file gives beside the lists as `name`."""
        value = self.table.extra.get(name)
        return value if isinstance(value, str) else None

    def items(self, name: str) -> Numbers:
        """Start, end and key of the items of list `name`. (n, 3)"""
        return np.asarray(self.table.values[self.table.values[:, 3] == LISTS.index(name), :3])


def looks_like_container(path: Path) -> bool:
    """Whether a file starts as an object with a known list of objects does, as far as its first
    megabyte shows; `open_container` knows."""
    head = next(read_chunks(path, CHUNK_BYTES), b"")
    # What is not UTF-8 is said with its line, when the file is opened.
    scanner = JsonScanner(iter([head.decode("utf-8", "replace").encode()]), Path())
    try:
        for name in scanner.members():
            scanner.take(":")
            if name in _ROW_KEYS:
                return False
            if name in LISTS and scanner.peek() == "[":
                scanner.take("[")
                return scanner.peek() == "{"
            scanner.value()
    except SampleError:
        return False
    return False


def open_container(path: Path, *, cache_dir: Path) -> Container | None:
    """The lists of a file, or None where another object follows: its lines are the rows then.

    Raises SampleError where the file is no JSON, VlmtuneError where it cannot be read.
    """
    stamp = stamp_of(path)

    def build(extra: Extra) -> Iterable[Numbers]:
        return in_pieces(_scan_container(path, extra), columns=4)

    table = open_table("lists", [(path, stamp)], columns=4, build=build, cache_dir=cache_dir)
    if not table.extra["is_alone"] or not table.extra["lists"]:
        return None
    return Container(path, stamp, table)


def rows_of(container: Container) -> SpanRows:
    """The objects of a file's only list. Raises VlmtuneError where it has several."""
    if len(container.lists) > 1:
        raise VlmtuneError(
            "the file holds several lists of objects",
            file=container.path,
            got=", ".join(f"{name} ({num:,})" for name, num in container.lists.items()),
            expected="one list, images and annotations (COCO), or questions (VQAv2)",
        )
    return SpanRows((container.opened,), container.table, parse_line)


def find_keys(wanted: Numbers, items: Numbers, *, file: Path, name: str) -> Numbers:
    """For each of the keys `wanted` (n,) the start and end of the item (rows of `items`: start,
    end, key) that has it, or -1 and -1. (n, 2)

    Raises VlmtuneError where two items have one key; `name` is what the key is called there.
    """
    items = items[items[:, 2] != NO_KEY]
    items = items[np.argsort(items[:, 2], kind="stable")]
    if (twice := np.flatnonzero(items[1:, 2] == items[:-1, 2])).size:
        raise VlmtuneError(
            f"{len(twice)} of {len(items)} objects have the {name} of another",
            file=file,
            got=f"the second such object starts at byte {int(items[twice[0] + 1, 0]) + 1}",
            expected=f"a {name} of its own for each",
        )
    if not len(items):
        return np.full((len(wanted), 2), -1, np.int64)
    at = np.minimum(np.searchsorted(items[:, 2], wanted), len(items) - 1)
    is_found = items[at, 2] == wanted
    return np.where(is_found[:, None], items[at, :2], -1)


def _scan_container(path: Path, extra: Extra) -> Iterator[tuple[int, int, int, int]]:
    scanner = JsonScanner(read_chunks(path, CHUNK_BYTES), path)
    extra.update(is_alone=True, lists={})
    is_row = False
    for name in scanner.members():
        scanner.take(":")
        is_row = is_row or name in _ROW_KEYS
        if scanner.peek() != "[":
            value = scanner.value().value
            if name in _KEPT_TEXTS:
                extra[name] = value
            continue
        number = LISTS.index(name) if name in LISTS else -1
        items = scanner.items()
        first = next(items, None)
        if first is None or number < 0 or not isinstance(first.value, dict):
            for _ in items:
                continue
            continue
        if name in extra["lists"]:
            raise VlmtuneError(f"the list {name} is given twice", file=path, expected="once")
        extra["lists"][name] = 0
        for item in itertools.chain((first,), items):
            extra["lists"][name] += 1
            yield item.start, item.end, _key(item.value, name), number
    extra["is_alone"] = scanner.peek() == "" and not is_row


def _key(value: Any, name: str) -> int:
    """What an item is joined by: whole numbers as they are, texts by a hash of 63 bits.

    Answers of VQAv2 belong to a question, captions of COCO to a picture.
    """
    if not isinstance(value, dict):
        return NO_KEY
    by = _JOINED_BY.get(name, "id")
    if name == "annotations" and "question_id" in value:
        by = "question_id"
    key = value.get(by)
    if isinstance(key, int) and not isinstance(key, bool) and NO_KEY < key < 2**63:
        return key
    if isinstance(key, str):
        return short_digest(key) >> 1
    return NO_KEY
