"""Where a picture or video may come from: a file below its row's folder, or a public URL."""

from __future__ import annotations

import errno
import ipaddress
import os
import stat
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from vlmtune.errors import VlmtuneError, shorten

_SPECIAL = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
MAX_NAME_CHARACTERS = 4096
"""Longer texts are not paths; base64 is first tried as a path."""


class NoSuchFile(VlmtuneError):
    """No file has this name: it may be base64 instead of a name."""


def find_file(ref: str, *, base_dir: Path, allow_outside: bool, what: str = "picture") -> Path:
    """The file `ref`, relative to `base_dir`; nothing is opened. `what` it is, for messages.

    Raises NoSuchFile where there is nothing of this name, and VlmtuneError for what is no ordinary
    file with content, cannot be read, or is outside `base_dir` once links are followed.
    """
    path = os.path.join(base_dir, ref)
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreachable(error, path, base_dir, what) from error
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise _missing(path, base_dir, what, "no file name has such characters") from error
    if not allow_outside and not is_inside(path, base_dir):
        real = os.path.realpath(path)
        via = "" if real == os.path.abspath(path) else f", which is {printable(real)}"
        raise VlmtuneError(
            f"the {what} is outside the folder of its data",
            got=printable(ref) + via,
            expected=f"a file below {base_dir}",
            do="name its folder as the entry's image_dir, or allow it with "
            "data.allow_outside_paths: true (on the command line: data.allow_outside_paths=true)",
        )
    _check_kind(status, path, what)
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise _unreadable(what, path, os.strerror(errno.EACCES))
    return Path(path)


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether `path` is below `folder`, all symbolic links followed."""
    real, base = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, base]) == base


def printable(text: str, limit: int = 120) -> str:
    """`text` for a message: short, and without characters that a terminal obeys or refuses."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in shorten(text))
    return shorten("".join(shown), limit)


def _unreachable(error: OSError, path: str, base_dir: Path, what: str) -> VlmtuneError:
    if error.errno == errno.ELOOP:
        return VlmtuneError(f"the {what} is a circular symbolic link", got=printable(path))
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if os.path.islink(path):
            return VlmtuneError(
                f"the {what} is a broken symbolic link",
                got=f"{printable(path)} -> {printable(os.readlink(path))}",
                do="restore its target, or correct the link",
            )
        return _missing(path, base_dir, what, None)
    if error.errno == errno.ENAMETOOLONG:
        return _missing(path, base_dir, what, "too long for a file name")
    return _unreadable(what, path, error.strerror or str(error))


def _missing(path: str, base_dir: Path, what: str, reason: str | None) -> NoSuchFile:
    return NoSuchFile(
        f"no such {what} file" + (f": {reason}" if reason else ""),
        got=printable(path),
        expected=f"a file, relative to {base_dir}",
        do=_meant(path, base_dir)
        or "correct the path, or name the folder as the entry's image_dir; or skip such samples "
        "with data.on_bad_sample: skip",
    )


def _meant(path: str, base_dir: Path) -> str | None:
    """What to write if the file exists under a Windows path, or with its extension in other case.

    Looks for a few names and lists no folder, which may be large.
    """
    if len(path) > MAX_NAME_CHARACTERS:
        return None
    name = os.path.relpath(path, base_dir)
    if "\\" in name:
        is_there = os.path.isfile(os.path.join(base_dir, name.replace("\\", "/")))
        better = f": {printable(name.replace(chr(92), '/'))}" if is_there else ""
        return f"write paths with / between folders, relative to the folder of the data{better}"
    stem, ending = os.path.splitext(name)
    for other in (ending.lower(), ending.upper()):
        if other != ending and os.path.isfile(os.path.join(base_dir, stem + other)):
            return f"write {printable(stem + other)}: upper and lower case differ"
    return None


def _unreadable(what: str, path: str, reason: str) -> VlmtuneError:
    return VlmtuneError(f"the {what} file cannot be read ({reason})", got=printable(path))


def _check_kind(status: os.stat_result, path: str, what: str) -> None:
    expected = f"a {what} file"
    if stat.S_ISDIR(status.st_mode):
        raise VlmtuneError(f"the {what} is a folder", got=printable(path), expected=expected)
    for is_kind, kind in _SPECIAL:  # never opened: a pipe nobody writes to blocks for ever
        if is_kind(status.st_mode):
            raise VlmtuneError(
                f"the {what} is {kind}, not a file", got=printable(path), expected=expected
            )
    if status.st_size == 0:
        raise VlmtuneError(f"the {what} file is empty", got=printable(path))


SCHEMES = ("http", "https")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_url(ref: str) -> bool:
    return ref[:8].lower().startswith(("http://", "https://"))


def split_url(url: str) -> SplitResult:
    """The parts of an http(s) URL with a host. Raises VlmtuneError."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # both are read only when asked for
        if host:
            host.encode("idna")
    except ValueError as error:  # UnicodeError is one
        raise VlmtuneError(f"not a URL ({error})", got=format_url(url)) from error
    if parts.scheme not in SCHEMES:
        raise VlmtuneError(
            f"a {parts.scheme or 'URL without a scheme'}: URL is not fetched",
            got=format_url(url),
            expected="http or https",
        )
    if not host:
        raise VlmtuneError("the URL has no host", got=format_url(url))
    return parts


def format_url(url: str) -> str:
    """The URL for messages: short, without user, password, and what its query says."""
    before, question, _ = url.partition("?")
    before = before.partition("#")[0]
    scheme, separator, rest = before.partition("://")
    host, slash, path = rest.partition("/")
    return printable(scheme + separator + host.rpartition("@")[2] + slash + path) + (
        "?…" if question else ""
    )


def check_literal_address(parts: SplitResult) -> None:
    """Raises VlmtuneError where the host is written as an address that is not public."""
    assert parts.hostname is not None
    try:
        address = ipaddress.ip_address(parts.hostname)
    except ValueError:  # a name: looked up when it is fetched
        return
    if not is_public(address):
        raise private_address(parts.geturl(), address)


def private_address(url: str, address: Address) -> VlmtuneError:
    return VlmtuneError(
        "the URL leads to an address that is not public",
        got=f"{format_url(url)} at {address}",
        do="set data.allow_private_addresses: true where the data is trusted",
    )


def is_public(address: Address) -> bool:
    """Whether this is an address of the public network: not private, loopback, link-local,
    multicast, reserved or unspecified; of an IPv6 address that holds an IPv4 one, that too."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address.teredo is not None:
            inner = address.teredo[1]
        elif address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not (
        address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
    )


HEAD_BYTES = 512

_MAGIC = (
    (b"\x89PNG", "a PNG"),
    (b"\xff\xd8\xff", "a JPEG"),
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\x00", "a TIFF"),
    (b"MM\x00*", "a TIFF"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript program"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)
_BRANDS = (
    ((b"heic", b"heix", b"mif1", b"heim", b"hevc"), "a HEIC picture"),
    ((b"avif", b"avis"), "an AVIF picture"),
    ((b"isom", b"mp4", b"qt  ", b"M4V", b"avc1"), "a video"),
)
_MARKUP = ((b"<!doctype html", "an HTML page"), (b"<html", "an HTML page"), (b"<svg", "SVG"))
_KNOWN = frozenset({"a PNG", "a JPEG", "a GIF", "a BMP", "a TIFF", "a WebP"})


def content_kind(head: bytes) -> str | None:
    """What a file with these first bytes is, in words; None where that cannot be told."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP"
    if head[4:8] == b"ftyp":
        named = (name for brands, name in _BRANDS if head[8:12].startswith(brands))
        return next(named, "a video or a HEIF picture")
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        return next((name for mark, name in _MARKUP if mark in text), "XML")
    return "JSON" if text.startswith((b"{", b"[")) else None


def is_readable_kind(kind: str) -> bool:
    """Whether pictures of this kind are read."""
    return kind in _KNOWN
