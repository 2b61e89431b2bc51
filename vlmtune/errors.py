"""Errors a user can act on: where, what is wrong, what was got, what was expected, what to do."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol


class Located(Protocol):
    """What has a place in a file, as a row has."""

    @property
    def file(self) -> str: ...

    @property
    def line(self) -> int | None: ...


class VlmtuneError(Exception):
    """The user's input is wrong; the command line prints it without a traceback and exits 2.

    Rendered as `FILE:LINE: message; got …; expected …; do …`, leaving out what is not given. The
    place is `at` something that has one, or a `file` with or without a `line`.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        at: Located | None = None,
        file: str | Path | None = None,
        line: int | None = None,
        got: object = None,
        expected: object = None,
        do: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if at is not None:
            file, line = at.file, at.line
        self.file = None if file is None else str(file)
        self.line = line
        self.got = got
        self.expected = expected
        self.do = do

    def __str__(self) -> str:
        place = "" if self.file is None else self.file
        if self.file is not None and self.line is not None:
            place = f"{self.file}:{self.line}"
        text = f"{place}: {self.message}" if place else self.message
        for label, value in (("got", self.got), ("expected", self.expected), ("do", self.do)):
            if value is not None:
                text += f"; {label}: {value}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        # Crosses process borders (DataLoader workers): keyword arguments do not pickle by default.
        return (_rebuild, (type(self), self.message, self.__dict__.copy()))


def _rebuild(kind: type[VlmtuneError], message: str, state: dict[str, object]) -> VlmtuneError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ErrorGroup(VlmtuneError):
    """Several user errors found at once, one line each."""

    def __init__(self, errors: Sequence[VlmtuneError]) -> None:
        super().__init__(plural(len(errors), "error"))
        self.errors = list(errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class SampleError(VlmtuneError):
    """One sample cannot be used; counted instead of raised with `data.on_bad_sample: skip`."""


@contextlib.contextmanager
def at(source: Located) -> Iterator[None]:
    """Within, an error without a place becomes a `SampleError` of the sample at `source`."""
    try:
        yield
    except VlmtuneError as error:
        if error.file is not None:
            raise
        raise SampleError(
            error.message, at=source, got=error.got, expected=error.expected, do=error.do
        ) from error


class CheckFailed(VlmtuneError):
    """The command ran and the answer is no (a merge did not verify); exits 1. `report` is what
    `--json` prints of it, if anything."""

    exit_code = 1
    report: object = None


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 sample`, `2,000 samples`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None where nothing is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


_TYPE_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    bytes: "bytes",
    type(None): "null",
}


def shorten(text: str, limit: int = 120) -> str:
    """`text` for a message: at most `limit` characters, the middle left out."""
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def describe(value: object) -> str:
    """What a row's value is, for a message: its type and, where short, its content."""
    kind = _TYPE_NAMES.get(type(value), type(value).__name__)
    if isinstance(value, (dict, list, bytes)) or value is None:
        return kind
    return f"{kind}: {shorten(repr(value), 60)}"


def escaped(text: str) -> str:
    """`text` with escapes for the characters that a terminal obeys, or that turn text around."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
