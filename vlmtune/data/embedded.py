"""Pictures written into the row itself: `data:` URLs and bare base64."""

from __future__ import annotations

import base64
import binascii
import re

from vlmtune.data.text import shorten
from vlmtune.errors import VlmtuneError

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_DATA_URL = re.compile(r"data:(?P<kind>[^;,]*)(?:;[^;,]+)*?(?P<base64>;base64)?,", re.IGNORECASE)
_HEADERS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


def decode_data_url(ref: str) -> bytes:
    """The bytes of a base64 `data:` URL. Raises VlmtuneError."""
    match = _DATA_URL.match(ref)
    if match is None or not match["base64"]:
        raise VlmtuneError(
            "not a data: URL of a picture",
            got=shorten(ref, 60),
            expected="data:image/png;base64,…",
        )
    try:
        decoded = base64.b64decode("".join(ref[match.end() :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise VlmtuneError(
            f"the data: URL does not hold base64 ({error})", got=shorten(ref, 60)
        ) from error
    if not decoded:
        raise VlmtuneError("the data: URL is empty", got=shorten(ref, 60))
    return decoded


def decode_bare_base64(ref: str) -> bytes | None:
    """The bytes of `ref` where it is base64 of something that starts like a picture."""
    if len(ref) < 32 or not _BASE64.fullmatch(ref):
        return None
    try:
        decoded = base64.b64decode("".join(ref.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.startswith(_HEADERS) else None
