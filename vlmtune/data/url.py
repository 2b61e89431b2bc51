"""URLs of media: their parts, how they are shown, and which addresses are public."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from vlmtune.data.safe_path import printable
from vlmtune.errors import VlmtuneError

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
        raise VlmtuneError(f"not a URL ({error})", got=shown_url(url)) from error
    if parts.scheme not in SCHEMES:
        raise VlmtuneError(
            f"a {parts.scheme or 'URL without a scheme'}: URL is not fetched",
            got=shown_url(url),
            expected="http or https",
        )
    if not host:
        raise VlmtuneError("the URL names no host", got=shown_url(url))
    return parts


def shown_url(url: str) -> str:
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
        got=f"{shown_url(url)} at {address}",
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
