"""Pictures and videos from http(s) URLs, once: kept by the hash of their content.

    URL -> allowed?            check_url: no network
        -> kept and unbroken?  CACHE/downloads/urls/<sha256 of URL> -> CACHE/downloads/<sha256>
        -> download            download.py, up to three times
        -> file beside, synced, renamed; then the URL's entry likewise

Two processes may fetch the same URL at once, and a kill may come anywhere: a file under its final
name is whole, and is compared with its name before it is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from urllib.parse import SplitResult

from vlmtune.data.content_kind import HEAD_BYTES, content_kind
from vlmtune.data.download import Limits, PassingError, download
from vlmtune.data.types import Access
from vlmtune.data.url import check_literal_address, is_url, shown_url, split_url
from vlmtune.errors import VlmtuneError

__all__ = ["check_url", "fetch", "is_url", "shown_url"]

ATTEMPTS = 3
BACKOFF_SECONDS = 0.5
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NO_MEDIA = ("an HTML page", "XML", "JSON")


def check_url(url: str, access: Access) -> SplitResult:
    """The parts of a URL that may be fetched; asks no network.

    Raises VlmtuneError where the recipe does not allow URLs, or this one.
    """
    if not access.allow_urls:
        raise VlmtuneError(
            "pictures are not fetched from the network",
            got=shown_url(url),
            do="set data.allow_urls: true (vlmtune eval: --allow-urls), or download the picture "
            "and give its path",
        )
    parts = split_url(url)
    if not access.allow_private_addresses:
        check_literal_address(parts)
    return parts


def fetch(url: str, access: Access, *, sleep: Callable[[float], None] = time.sleep) -> Path:
    """The file with what `url` holds, downloaded unless it is kept already.

    Time-outs, broken connections, 429 and 5xx are tried again, three times in all, after
    0.5 and 1 seconds or what the server asks for. Raises VlmtuneError with the URL and the reason.
    """
    check_url(url, access)
    folder = download_folder(access)
    entry = folder / "urls" / hashlib.sha256(url.encode("utf-8", "backslashreplace")).hexdigest()
    kept = _kept(entry, folder)
    if kept is not None:
        _check_kept_size(kept, url, access)
        return kept
    for attempt in range(ATTEMPTS):
        try:
            return _download(url, access, entry=entry, folder=folder)
        except PassingError as error:
            if attempt == ATTEMPTS - 1:
                error.message += f", {ATTEMPTS} times"
                raise
            sleep(max(BACKOFF_SECONDS * 2**attempt, error.retry_after_seconds))
    raise AssertionError("the last attempt returns or raises")


def download_folder(access: Access) -> Path:
    """Where downloads are kept: in the recipe's `data.cache_dir`, or the user's cache."""
    return access.cache_folder / "downloads"


def _kept(entry: Path, folder: Path) -> Path | None:
    """The file that the URL's entry names, where both are whole."""
    try:
        digest = entry.read_text("ascii").strip()
        if not _DIGEST.fullmatch(digest):
            return None
        with (folder / digest).open("rb") as stream:
            return folder / digest if _sha256(stream) == digest else None
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    except OSError as error:
        raise _cache_error(folder, error) from error


def _check_kept_size(kept: Path, url: str, access: Access) -> None:
    # The same answer whether it is kept or not.
    size = kept.stat().st_size
    if size > access.max_download_bytes:
        raise VlmtuneError(
            "the download is too large",
            got=f"{shown_url(url)}: {size} bytes",
            expected=f"at most {access.max_download_bytes} (data.max_download_bytes)",
        )


def _download(url: str, access: Access, *, entry: Path, folder: Path) -> Path:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".part-")
    except OSError as error:
        raise _cache_error(folder, error) from error
    limits = Limits(
        max_bytes=access.max_download_bytes,
        seconds=access.url_timeout_seconds,
        allow_private_addresses=access.allow_private_addresses,
    )
    try:
        with os.fdopen(handle, "w+b") as stream:
            download(url, stream, limits=limits)
            _check_content(stream, url)
            digest = _sha256(stream)
            _sync(stream)
        os.replace(name, folder / digest)
        _write_entry(entry, digest)
    except OSError as error:
        raise _cache_error(folder, error) from error
    finally:
        Path(name).unlink(missing_ok=True)
    return folder / digest


def _check_content(stream: BinaryIO, url: str) -> None:
    """An error page with status 200 is no picture, and is not to be kept as one."""
    stream.seek(0)
    head = stream.read(HEAD_BYTES)
    if not head:
        raise VlmtuneError("the download is empty", got=shown_url(url))
    kind = content_kind(head)
    if kind in _NO_MEDIA:
        raise VlmtuneError(
            f"the URL leads to {kind}, not to a picture",
            got=shown_url(url),
            do="give the address of the picture itself",
        )


def _write_entry(entry: Path, digest: str) -> None:
    handle, name = tempfile.mkstemp(dir=entry.parent, prefix=".part-")
    with os.fdopen(handle, "w+b") as stream:
        stream.write(f"{digest}\n".encode())
        _sync(stream)
    os.replace(name, entry)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    os.fchmod(stream.fileno(), 0o644)  # a temporary file is its maker's alone; a cache is shared


def _sha256(stream: BinaryIO) -> str:
    stream.seek(0)
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _cache_error(folder: Path, error: OSError) -> VlmtuneError:
    return VlmtuneError(
        f"the folder of downloads cannot be used ({error.strerror})",
        file=folder,
        do="name another with data.cache_dir",
    )
