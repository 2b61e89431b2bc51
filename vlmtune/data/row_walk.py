"""Every row of some files in turn: a conversation, or the error that says why it is none.

Ids are compared over all files by 8-byte digests, so that a million rows take some 70 MB at most.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from vlmtune.data.dataset import OpenFile
from vlmtune.data.formats.registry import parse_row, unused_keys
from vlmtune.data.source import NEW_IDS
from vlmtune.data.text import shorten
from vlmtune.data.types import Conversation, Source
from vlmtune.errors import ErrorGroup, SampleError, VlmtuneError, plural

MAX_NAMED = 20
"""Bad rows that are told in words; the others are counted."""


@dataclass
class BadRows:
    """The rows that cannot be used: how many, and the first in words."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, error: SampleError) -> None:
        self.count += 1
        if len(self.named) < MAX_NAMED:
            self.named.append(str(error))

    def as_error(self) -> ErrorGroup:
        """All of them as one error: the first in words, the rest counted."""
        errors = [VlmtuneError(text) for text in self.named]
        if self.count > len(self.named):
            errors.append(
                VlmtuneError(f"and {plural(self.count - len(self.named), 'more bad row')}")
            )
        return ErrorGroup(errors)


@dataclass
class RowWalk:
    """`files` in order. `unused` counts, by name, the keys that no conversation is made from.

    `new_ids`: rows are called by file and line, whatever ids they have.
    """

    files: Sequence[OpenFile]
    new_ids: bool = False
    unused: Counter[str] = field(default_factory=Counter)
    _ids: set[int] = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        return sum(len(file.rows) for file in self.files)

    def rows(
        self, *, start: int = 0, only: Sequence[int] | None = None
    ) -> Iterator[tuple[Source, Conversation | SampleError]]:
        """From row `start` (0-based, over all files) on, each with its place; or the rows `only`,
        whose numbers rise."""
        numbers = range(start, len(self)) if only is None else only
        for file, index in _located(self.files, numbers):
            source = file.rows.place(index)
            try:
                yield source, self._conversation(file, index)
            except SampleError as error:
                yield source, error

    def place(self, number: int) -> Source:
        """Where row `number` stands."""
        [(file, index)] = _located(self.files, [number])
        return file.rows.place(index)

    def take_id(self, name: str) -> None:
        """Note the id of a row that is used: from now on it is taken."""
        self._ids.add(_digest(name))

    def _conversation(self, file: OpenFile, index: int) -> Conversation:
        row = file.row(index)
        self.unused.update(unused_keys(row.values, file.entry, file.format))
        conversation = parse_row(row, file.format)
        if self.new_ids:
            conversation = replace(conversation, id=row.fallback_id)
        if _digest(conversation.id) in self._ids:
            raise SampleError(
                f"the id {shorten(conversation.id, 60)!r} is taken",
                file=conversation.source.file,
                line=conversation.source.line,
                got="the same id in an earlier row",
                expected="an id of its own",
                do=NEW_IDS,
            )
        return conversation


def _digest(name: str) -> int:
    content = name.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _located(files: Sequence[OpenFile], numbers: Sequence[int]) -> Iterator[tuple[OpenFile, int]]:
    """The file and the row in it of each of `numbers`, which rise."""
    at = before = 0
    for number in numbers:
        while number >= before + len(files[at].rows):
            before += len(files[at].rows)
            at += 1
        yield files[at], number - before
