"""Parses JSON of data files strictly; every error has its place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vlmtune.data.types import Source
from vlmtune.errors import SampleError, describe, shorten

BOM = b"\xef\xbb\xbf"


def parse_line(line: bytes, source: Source) -> Mapping[str, Any]:
    """The object that a line holds. Raises SampleError with its place."""
    file, number = source.file, source.line
    try:
        return as_row(load_json(line), source)
    except UnicodeDecodeError as error:
        raise SampleError(
            f"the line is not UTF-8 (byte {error.start + 1})",
            file=file,
            line=number,
            do="save the file as UTF-8",
        ) from error
    except json.JSONDecodeError as error:
        raise SampleError(
            f"not JSON ({error.msg}, column {error.colno})",
            file=file,
            line=number,
            got=shorten(line.decode("utf-8").strip(), 60),
            expected="one JSON object a line",
        ) from error
    except (ValueError, RecursionError) as error:
        raise SampleError(f"not JSON ({reason(error)})", file=file, line=number) from error


def load_json(content: bytes) -> Any:
    """The value of UTF-8 JSON text; NaN, infinities and a key given twice are ValueErrors."""
    return json.loads(
        content.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
    )


def as_row(value: Any, source: Source) -> Mapping[str, Any]:
    """`value` where it is an object. Raises SampleError."""
    if not isinstance(value, dict):
        raise SampleError(
            "the row is not an object",
            at=source,
            got=describe(value),
            expected='{"messages": […]}',
        )
    return value


def reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value: write null, or a number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is given twice")
    return values
