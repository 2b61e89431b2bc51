"""JSON too large to be held: read from front to back, one value in memory at a time.

Offsets are in bytes, lines are 1-based. Every fault is a SampleError at its line.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlmtune.data.sources.json_text import BOM, load_json, reason
from vlmtune.errors import SampleError

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
