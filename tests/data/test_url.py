"""URLs: which are fetched, how they are shown, and which addresses count as public."""

from __future__ import annotations

import ipaddress

import pytest

from vlmtune.data.locations import check_literal_address, format_url, is_public, is_url, split_url
from vlmtune.errors import VlmtuneError


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "fe80::1",
        "fe80::1%1",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "64:ff9b::10.0.0.1",
        "2001:0:0:0:0:0:80ff:fffe",
    ],
)
def test_addresses_of_machines_and_networks_of_ones_own_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "93.184.216.34",
        "172.32.0.1",
        "2606:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
    ],
)
def test_addresses_of_the_public_network_are_public(address):
    assert is_public(ipaddress.ip_address(address))


def test_user_password_and_query_are_not_shown():
    shown = format_url("https://me:secret@example.org:8443/a/b.png?token=abc#part")
    assert shown == "https://example.org:8443/a/b.png?…"
    assert format_url("http://a:b@c@example.org") == "http://example.org"
    assert format_url("http://example.org/a@b.png") == "http://example.org/a@b.png"
    assert format_url("http://example.org/\x1b[2J") == "http://example.org/\\x1b[2J"
    assert len(format_url("http://example.org/" + "a" * 5000)) <= 120


def test_only_http_and_https_are_urls():
    assert is_url("http://a/b") and is_url("HTTPS://a/b")
    assert not is_url("httpx://a") and not is_url("ftp://a/b") and not is_url("http.png")
    assert split_url("HTTP://Example.org:80/a").hostname == "example.org"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/passwd", "a file: URL is not fetched"),
        ("ftp://example.org/a.png", "a ftp: URL is not fetched"),
        ("gopher://example.org", "a gopher: URL"),
        ("http:///a.png", "has no host"),
        ("http://user@/a.png", "has no host"),
        ("http://example.org:99999/", "not a URL"),
        ("http://example.org:x/", "not a URL"),
        ("http://[::1/", "not a URL"),
        ("http://" + "a" * 64 + ".org/", "not a URL"),
        ("http://a..b/", "not a URL"),
    ],
)
def test_urls_that_are_none_or_of_other_kinds_are_refused(url, reason):
    with pytest.raises(VlmtuneError, match=reason):
        split_url(url)


def test_a_host_written_as_a_private_address_is_refused_without_a_look_up():
    for host in ("127.0.0.1", "[::1]", "[::ffff:10.0.0.1]", "169.254.169.254"):
        with pytest.raises(VlmtuneError, match="not public.*allow_private_addresses"):
            check_literal_address(split_url(f"http://{host}/a.png"))
    for host in ("8.8.8.8", "example.org", "localhost"):  # names are looked up later
        check_literal_address(split_url(f"http://{host}/a.png"))
