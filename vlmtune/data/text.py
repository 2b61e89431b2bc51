"""Values in messages: what they are, in few characters."""

from __future__ import annotations

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
