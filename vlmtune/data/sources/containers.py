"""JSON files that are one object around lists of objects: `{"data": […]}`, COCO, VQAv2.

file -> table of the items of its known lists (list, start, end, key to join by), and the names
  -> items of the only list | COCO: captions joined with pictures | VQAv2: questions and answers
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlmtune.data.index import (
    Extra,
    Numbers,
    Stamp,
    Table,
    in_pieces,
    open_table,
    read_chunks,
    stamp_of,
)
from vlmtune.data.sources.json_array import JsonItems
from vlmtune.data.sources.json_scan import CHUNK_BYTES, JsonScanner
from vlmtune.errors import SampleError, VlmtuneError

LISTS = ("images", "annotations", "questions", "data", "samples", "examples", "rows", "items")
NO_KEY = -(2**63)
"""Stands for a missing id, or one that is neither a whole number nor a text."""

_JOINED_BY = {"images": "id", "annotations": "image_id", "questions": "question_id"}
_ROW_KEYS = frozenset({"messages", "conversations"})
_KEPT_TEXTS = ("data_type", "data_subtype")
_PIECE_ROWS = 1 << 16


class Container:
    """A file's `table`: the number in LISTS, the start, the end and the key of each item."""

    def __init__(self, path: Path, stamp: Stamp, table: Table) -> None:
        self.path = path
        self.stamp = stamp
        self.table = table

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
        return np.asarray(self.table.values[self.table.values[:, 0] == LISTS.index(name), 1:])


def looks_like_container(head: bytes) -> bool:
    """Whether a file that starts with `head` is an object with a known list of objects, as far as
    one can tell; `open_container` knows."""
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
        return in_pieces(_scan(path, extra), columns=4)

    table = open_table("container", [(path, stamp)], columns=4, build=build, cache_dir=cache_dir)
    if not table.extra["is_alone"] or not table.extra["lists"]:
        return None
    return Container(path, stamp, table)


def open_items(container: Container, *, cache_dir: Path) -> JsonItems:
    """The objects of a file's only list. Raises VlmtuneError where it has several."""
    if len(container.lists) > 1:
        raise VlmtuneError(
            "the file holds several lists of objects",
            file=container.path,
            got=", ".join(f"{name} ({num:,})" for name, num in container.lists.items()),
            expected="one list, images and annotations (COCO), or questions (VQAv2)",
        )
    values = container.table.values
    table = open_table(
        "items",
        [(container.path, container.stamp)],
        columns=2,
        build=lambda extra: (
            values[at : at + _PIECE_ROWS, 1:3] for at in range(0, len(values), _PIECE_ROWS)
        ),
        cache_dir=cache_dir,
    )
    return JsonItems(container.path, container.stamp, table)


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


def _scan(path: Path, extra: Extra) -> Iterator[tuple[int, int, int, int]]:
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
            yield number, item.start, item.end, _key(item.value, name)
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
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1
    return NO_KEY
