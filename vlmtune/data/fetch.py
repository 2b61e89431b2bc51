"""Pictures and videos from http(s) URLs, downloaded once and kept by the hash of their content.

    URL -> resolve once -> every address public? -> connect to that address (TLS: the host's name)
        -> redirect: the same again, at most five times -> body, counted as it comes

A name is resolved once, so a different answer a moment later (DNS rebinding) has no effect. Proxies
from environment variables are not used, because what they connect to cannot be checked.

    URL -> allowed?            check_url: no network
        -> kept and unbroken?  CACHE/downloads/urls: digest of URL -> CACHE/downloads/<sha256>
        -> download            up to three times, into a file without a name
        -> CACHE/downloads/<sha256>, then the record of the URL

A kept file is compared with its name before it is used.
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, quote, unquote, urljoin

from vlmtune import __version__
from vlmtune.data.locations import (
    HEAD_BYTES,
    check_literal_address,
    content_kind,
    format_url,
    is_public,
    printable,
    private_address,
    split_url,
)
from vlmtune.data.types import MediaPolicy
from vlmtune.errors import VlmtuneError
from vlmtune.files import DiskStore, digest, whole_file

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
LONGEST_WAIT_SECONDS = 30.0
CHUNK_BYTES = 1 << 16
_PORTS = {"http": 80, "https": 443}
_UNCHANGED = "/%:@!$&'()*+,;=~-._?"


class PassingError(VlmtuneError):
    """A temporary error: a retry may succeed."""

    retry_after_seconds = 0.0


def download(url: str, into: BinaryIO, *, media_policy: MediaPolicy) -> None:
    """Write what `url` holds into `into`.

    The time limit of `media_policy` is for all of it, redirects included; only the look-up of the
    host's name has the system's own limit.

    Raises PassingError for time-outs, broken connections, 429 and 5xx, and VlmtuneError for
    whatever else is wrong.
    """
    deadline = time.monotonic() + media_policy.url_timeout_seconds
    current = url
    for _ in range(MAX_REDIRECTS + 1):
        parts = split_url(current)
        try:
            target = _one_request(parts, into, media_policy=media_policy, deadline=deadline)
        except TimeoutError as error:
            raise PassingError(
                f"the download took longer than {media_policy.url_timeout_seconds:g} seconds",
                got=format_url(url),
                do="raise data.url_timeout_seconds, or download the picture yourself",
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise VlmtuneError(
                f"the server's certificate is not valid ({error.verify_message})",
                got=format_url(current),
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise PassingError(
                f"the connection failed ({_reason(error)})",
                got=format_url(current),
                do="check the address and the network connection",
            ) from error
        if target is None:
            return
        current = target
    raise VlmtuneError(f"the URL redirects more than {MAX_REDIRECTS} times", got=format_url(url))


def _one_request(
    parts: SplitResult, into: BinaryIO, *, media_policy: MediaPolicy, deadline: float
) -> str | None:
    """None after the body is written; where the server sends elsewhere, the URL of that."""
    sock = _connect(parts, media_policy=media_policy, deadline=deadline)
    connection = http.client.HTTPConnection(str(parts.hostname), _port(parts))
    connection.sock = _TimedSocket(sock, deadline)  # already at the address that was checked
    try:
        connection.request("GET", _request_target(parts), headers=_headers(parts))
        with connection.getresponse() as response:
            if response.status in REDIRECTS:
                return _next_url(parts, response)
            _check_status(parts, response)
            _write_body(parts, response, into, media_policy=media_policy)
            return None
    finally:
        connection.close()


def _connect(parts: SplitResult, *, media_policy: MediaPolicy, deadline: float) -> socket.socket:
    host, port = str(parts.hostname), _port(parts)
    addresses = _resolve(parts, host, port)
    if not media_policy.allow_private_addresses:
        for found in addresses:
            address = ipaddress.ip_address(found)
            if not is_public(address):
                raise private_address(parts.geturl(), address)
    failure: OSError | None = None
    for found in addresses:
        try:
            sock = socket.create_connection((found, port), timeout=_remaining(deadline))
        except TimeoutError:
            raise
        except OSError as error:
            failure = error
            continue
        if parts.scheme == "http":
            return sock
        try:
            sock.settimeout(_remaining(deadline))
            return ssl.create_default_context().wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise
    assert failure is not None
    raise failure


def _resolve(parts: SplitResult, host: str, port: int) -> list[str]:
    """Every address of the host, in the system's order."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        kind = PassingError if error.errno == socket.EAI_AGAIN else VlmtuneError
        raise kind(
            f"the host name cannot be resolved ({error.strerror})",
            got=format_url(parts.geturl()),
            do="check the address and the network connection",
        ) from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _request_target(parts: SplitResult) -> str:
    path = quote(parts.path or "/", safe=_UNCHANGED)
    return path + ("?" + quote(parts.query, safe=_UNCHANGED) if parts.query else "")


def _headers(parts: SplitResult) -> dict[str, str]:
    host = str(parts.hostname)
    host = f"[{host}]" if ":" in host else host.encode("idna").decode()
    if parts.port is not None and parts.port != _PORTS[parts.scheme]:
        host += f":{parts.port}"
    headers = {
        "Host": host,
        "User-Agent": f"vlmtune/{__version__}",
        "Accept": "image/*,video/*;q=0.9,*/*;q=0.5",
        "Connection": "close",
    }
    if parts.username is not None:
        named = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(named).decode()}"
    return headers


def _next_url(parts: SplitResult, response: http.client.HTTPResponse) -> str:
    location = response.getheader("Location")
    if not location:
        raise VlmtuneError(
            f"the server answered {response.status} without a redirect target",
            got=format_url(parts.geturl()),
        )
    try:
        return urljoin(parts.geturl(), location)
    except ValueError as error:
        raise VlmtuneError(
            f"the server redirects to an invalid URL ({error})", got=printable(location)
        ) from error


def _check_status(parts: SplitResult, response: http.client.HTTPResponse) -> None:
    if response.status == http.client.OK:
        return
    passes = response.status == http.client.TOO_MANY_REQUESTS or response.status >= 500
    error = (PassingError if passes else VlmtuneError)(
        f"the server answered {response.status} {printable(response.reason)}".rstrip(),
        got=format_url(parts.geturl()),
        do="correct the URL, or remove the sample" if not passes else "try again later",
    )
    wait = response.getheader("Retry-After", "")
    if isinstance(error, PassingError) and wait.isdecimal():
        error.retry_after_seconds = min(float(wait), LONGEST_WAIT_SECONDS)
    raise error


def _write_body(
    parts: SplitResult,
    response: http.client.HTTPResponse,
    into: BinaryIO,
    *,
    media_policy: MediaPolicy,
) -> None:
    into.seek(0)
    into.truncate()
    num_bytes = response.length or 0  # what the header says, to begin with
    if num_bytes <= media_policy.max_download_bytes:
        num_bytes = 0
        while chunk := response.read1(CHUNK_BYTES):
            num_bytes += len(chunk)
            if num_bytes > media_policy.max_download_bytes:
                break
            _write(into, chunk)
    if num_bytes > media_policy.max_download_bytes:
        raise VlmtuneError(
            "the download is too large",
            got=f"{format_url(parts.geturl())}: {num_bytes} bytes or more",
            expected=f"at most {media_policy.max_download_bytes} (data.max_download_bytes)",
        )
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)


def _write(into: BinaryIO, chunk: bytes) -> None:
    try:
        into.write(chunk)
    except OSError as error:  # a full disk is no broken connection
        raise VlmtuneError(
            f"the download cannot be written ({error.strerror})",
            do="free space, or set data.cache_dir to another folder",
        ) from error


def _port(parts: SplitResult) -> int:
    return _PORTS[parts.scheme] if parts.port is None else parts.port


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _reason(error: OSError | http.client.HTTPException) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "it ended early"
    text = error.strerror if isinstance(error, OSError) else str(error)
    return printable(text or str(error) or type(error).__name__)


class _TimedSocket:
    """A connected socket as http.client uses it, each of whose calls ends at `deadline`: a server
    that sends a byte now and then is not waited for longer."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_remaining(self._deadline))
        self._sock.sendall(data)

    def makefile(self, mode: str, *_: Any) -> BinaryIO:
        assert mode == "rb"
        return io.BufferedReader(_TimedReader(self._sock, self._deadline))

    def close(self) -> None:
        self._sock.close()


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)  # keeps the connection open until closed
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_remaining(self._deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


ATTEMPTS = 3
BACKOFF_SECONDS = 0.5
_NO_MEDIA = ("an HTML page", "XML", "JSON")


def check_url(url: str, media_policy: MediaPolicy) -> SplitResult:
    """The parts of a URL that may be fetched; asks no network.

    Raises VlmtuneError where the recipe does not allow URLs, or this one.
    """
    if not media_policy.allow_urls:
        raise VlmtuneError(
            "pictures are not fetched from the network",
            got=format_url(url),
            do="set data.allow_urls: true (on the command line: data.allow_urls=true), or download "
            "the picture and give its path",
        )
    parts = split_url(url)
    if not media_policy.allow_private_addresses:
        check_literal_address(parts)
    return parts


def fetch(
    url: str, media_policy: MediaPolicy, *, sleep: Callable[[float], None] = time.sleep
) -> Path:
    """The file with what `url` holds, downloaded unless it is kept already.

    Time-outs, broken connections, 429 and 5xx are tried again, three times in all, after
    0.5 and 1 seconds or what the server asks for. Raises VlmtuneError with the URL and the reason.
    """
    check_url(url, media_policy)
    folder = download_folder(media_policy)
    names = DiskStore(folder / "urls", "download records", str.encode, bytes.decode)
    try:
        kept = _kept(names.get(digest(url)), folder)
        if kept is None:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as stream:
                _download(url, stream, media_policy, sleep=sleep)
                _check_content(stream, url)
                kept = _keep(stream, folder)
            names.put(digest(url), kept.name)
        _check_kept_size(kept, url, media_policy)
        return kept
    except OSError as error:
        raise VlmtuneError(
            f"the folder of downloads cannot be used ({error.strerror})",
            file=folder,
            do="set data.cache_dir to another folder",
        ) from error


def _download(
    url: str, into: BinaryIO, media_policy: MediaPolicy, *, sleep: Callable[[float], None]
) -> None:
    for attempt in range(ATTEMPTS):
        try:
            return download(url, into, media_policy=media_policy)
        except PassingError as error:
            if attempt == ATTEMPTS - 1:
                error.message += f", {ATTEMPTS} times"
                raise
            sleep(max(BACKOFF_SECONDS * 2**attempt, error.retry_after_seconds))
    raise AssertionError("the last attempt returns or raises")


def download_folder(media_policy: MediaPolicy) -> Path:
    """Where downloads are kept: in the recipe's `data.cache_dir`, or the user's cache."""
    return media_policy.cache_folder / "downloads"


def _kept(name: str | None, folder: Path) -> Path | None:
    """The file of this name, which is the digest of its content, where it is whole."""
    if name is None:
        return None
    try:
        return folder / name if digest(folder / name) == name else None
    except FileNotFoundError:
        return None


def _keep(stream: BinaryIO, folder: Path) -> Path:
    """A file with what `stream` holds, called by its digest."""
    stream.seek(0)
    name = digest(stream)
    stream.seek(0)
    with whole_file(folder / name) as kept:
        shutil.copyfileobj(stream, kept)
    return folder / name


def _check_kept_size(kept: Path, url: str, media_policy: MediaPolicy) -> None:
    # The same answer whether it is kept or not.
    size = kept.stat().st_size
    if size > media_policy.max_download_bytes:
        raise VlmtuneError(
            "the download is too large",
            got=f"{format_url(url)}: {size} bytes",
            expected=f"at most {media_policy.max_download_bytes} (data.max_download_bytes)",
        )


def _check_content(stream: BinaryIO, url: str) -> None:
    """Refuse an error page with status 200, which must not be stored as a picture."""
    stream.seek(0)
    head = stream.read(HEAD_BYTES)
    if not head:
        raise VlmtuneError("the download is empty", got=format_url(url))
    kind = content_kind(head)
    if kind in _NO_MEDIA:
        raise VlmtuneError(
            f"the URL returns {kind}, not a picture",
            got=format_url(url),
            do="give the address of the picture itself",
        )
