"""URLs are fetched within limits, from checked addresses, and kept by their content."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from tests.data.odd_pictures import encoded
from tests.data.web_server import Handler, WebServer, answer, in_turn, redirect, serving
from vlmtune.data.fetch import ATTEMPTS, download_folder, fetch
from vlmtune.data.media import content_digest, open_image
from vlmtune.data.types import Image, MediaPolicy
from vlmtune.errors import VlmtuneError

PNG = encoded(PIL.Image.new("RGB", (8, 4), "red"), "PNG")
OTHER = encoded(PIL.Image.new("RGB", (8, 4), "blue"), "PNG")


@pytest.fixture
def server() -> Iterator[WebServer]:
    with serving() as server:
        yield server


@pytest.fixture
def media_policy(tmp_path: Path) -> MediaPolicy:
    return MediaPolicy(
        allow_urls=True,
        allow_private_addresses=True,
        max_download_bytes=10_000,
        url_timeout_seconds=5,
        cache_dir=tmp_path / "cache",
    )


class Waits(list[float]):
    """Remembers how long it was waited, without waiting."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def refused(url: str, media_policy: MediaPolicy) -> str:
    """The message that fetching ends in; nothing may be left half done."""
    with pytest.raises(VlmtuneError) as caught:
        fetch(url, media_policy, sleep=Waits())
    files = [path for path in download_folder(media_policy).rglob("*") if path.is_file()]
    assert files == []
    return str(caught.value)


def test_a_picture_is_fetched_once_and_kept_by_its_content(server, media_policy):
    server.pages |= {"/a.png": answer(PNG), "/same.png": answer(PNG)}
    path = fetch(server.url("/a.png"), media_policy)
    assert path.read_bytes() == PNG
    assert path == media_policy.cache_dir / "downloads" / hashlib.sha256(PNG).hexdigest()
    assert fetch(server.url("/a.png"), media_policy) == path
    assert server.num_asked("/a.png") == 1
    assert fetch(server.url("/same.png"), media_policy) == path
    assert len([p for p in download_folder(media_policy).iterdir() if p.is_file()]) == 1


def test_an_image_of_a_url_opens(server, media_policy, tmp_path):
    server.pages["/a.png"] = answer(PNG)
    image = Image(server.url("/a.png"), tmp_path, media_policy=media_policy)
    assert open_image(image, max_pixels=100).getpixel((0, 0)) == (255, 0, 0)
    assert content_digest(image) == hashlib.sha256(PNG).hexdigest()
    with pytest.raises(VlmtuneError, match="allow_urls: true"):
        open_image(
            replace(image, media_policy=replace(media_policy, allow_urls=False)), max_pixels=100
        )


@pytest.mark.parametrize("damage", ["content", "cut", "gone", "entry", "no entry"])
def test_what_is_kept_but_broken_is_fetched_anew(damage, server, media_policy):
    server.pages["/a.png"] = answer(PNG)
    path = fetch(server.url("/a.png"), media_policy)
    (entry,) = (path.parent / "urls").glob("*/*")
    if damage == "content":
        path.write_bytes(PNG[:-1] + b"x")
    elif damage == "cut":
        os.truncate(path, 10)
    elif damage == "gone":
        path.unlink()
    elif damage == "entry":
        entry.write_bytes(b"\xff../../../etc/passwd")
    else:
        entry.unlink()
    assert fetch(server.url("/a.png"), media_policy).read_bytes() == PNG
    assert server.num_asked("/a.png") == 2
    fetch(server.url("/a.png"), media_policy)
    assert server.num_asked("/a.png") == 2


def test_many_at_once_get_the_whole_picture(server, media_policy):
    server.pages["/a.png"] = answer(PNG)
    start, found = threading.Barrier(8), []

    def work() -> None:
        start.wait()
        found.append(fetch(server.url("/a.png"), media_policy).read_bytes())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [PNG] * 8
    assert [p.name for p in download_folder(media_policy).rglob("*") if ".writing" in p.name] == []


def test_a_download_that_was_killed_leaves_nothing_that_is_used(server, media_policy):
    folder = download_folder(media_policy)
    folder.mkdir(parents=True)
    (folder / ".writing-killed").write_bytes(PNG[:20])  # as a kill leaves it
    server.pages["/a.png"] = answer(PNG)
    assert fetch(server.url("/a.png"), media_policy).read_bytes() == PNG


def test_redirects_are_followed_five_times(server, media_policy):
    for number, status in enumerate((301, 302, 303, 307, 308, 301, 302)):
        server.pages[f"/{number}"] = redirect(f"/{number + 1}", status=status)
    server.pages["/7"] = answer(PNG)
    assert fetch(server.url("/2"), media_policy).read_bytes() == PNG
    shutil.rmtree(media_policy.cache_dir)
    assert "redirects more than 5 times" in refused(server.url("/1"), media_policy)


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file:///etc/passwd", "a file: URL is not fetched"),
        ("ftp://example.org/a.png", "a ftp: URL is not fetched"),
        ("data:image/png;base64,AAAA", "a data: URL is not fetched"),
        ("http://[::1", "invalid URL"),
        ("http://user@/a.png", "has no host"),
        ("", "without a redirect target"),
    ],
)
def test_a_redirect_to_what_is_not_fetched_is_refused(location, reason, server, media_policy):
    server.pages["/a.png"] = redirect(location)
    assert reason in refused(server.url("/a.png"), media_policy)
    assert server.num_asked("/a.png") == 1


def named(monkeypatch: pytest.MonkeyPatch, **addresses: list[list[str]]) -> list[str]:
    """Host names with addresses: a list for each look-up, the last one over and over. The names
    looked up are noted in the result."""
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *rest: int, **named: int) -> list[object]:
        if host not in addresses:
            return real(host, port, *rest, **named)
        looked_up.append(host)
        found = addresses[host]
        current = found.pop(0) if len(found) > 1 else found[0]
        return [entry for address in current for entry in real(address, port, *rest, **named)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return looked_up


def test_private_addresses_are_refused_wherever_they_come_from(server, media_policy, monkeypatch):
    server.pages["/a.png"] = answer(PNG)
    only_public = replace(media_policy, allow_private_addresses=False)
    named(monkeypatch, inside=[["127.0.0.1"]], both=[["8.8.8.8", "127.0.0.1"]])
    for host in ("127.0.0.1", "inside", "both", "2130706433", "[::ffff:127.0.0.1]"):
        reason = refused(server.url("/a.png", host), only_public)
        assert "not public" in reason and "allow_private_addresses" in reason
    assert server.seen == []
    assert fetch(server.url("/a.png", "inside"), media_policy).read_bytes() == PNG


def test_a_redirect_to_a_private_address_is_refused(server, media_policy, monkeypatch):
    # The first host counts as public here; what it leads to does not.
    monkeypatch.setattr("vlmtune.data.fetch.is_public", lambda address: str(address)[-1] == "1")
    named(monkeypatch, outside=[["127.0.0.1"]], inside=[["127.0.0.2"]])
    server.pages |= {
        "/to-inside": redirect(server.url("/a.png", "inside")),
        "/to-outside": redirect(server.url("/a.png", "outside")),
        "/a.png": answer(PNG),
    }
    only_public = replace(media_policy, allow_private_addresses=False)
    reason = refused(server.url("/to-inside", "outside"), only_public)
    assert "not public; got: http://inside" in reason
    assert server.num_asked("/a.png") == 0
    assert fetch(server.url("/to-outside", "outside"), only_public).read_bytes() == PNG


def test_a_name_is_looked_up_once_and_that_address_is_used(server, media_policy, monkeypatch):
    server.pages["/a.png"] = answer(PNG)
    # Looked up again, it leads where nothing listens.
    looked_up = named(monkeypatch, rebound=[["127.0.0.1"], ["127.0.0.77"]])
    assert fetch(server.url("/a.png", "rebound"), media_policy).read_bytes() == PNG
    assert looked_up == ["rebound"]
    assert server.seen[0][1]["Host"] == f"rebound:{server.port}"
    shutil.rmtree(media_policy.cache_dir)
    assert "connection failed (Connection refused), 3 times" in refused(
        server.url("/a.png", "rebound"), media_policy
    )


def test_the_next_address_is_tried_where_one_does_not_answer(server, media_policy, monkeypatch):
    server.pages["/a.png"] = answer(PNG)
    named(monkeypatch, two=[["127.0.0.77", "127.0.0.1"]])
    assert fetch(server.url("/a.png", "two"), media_policy).read_bytes() == PNG


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(status, server, media_policy):
    busy = answer(b"busy", status=status)
    server.pages |= {
        "/a.png": in_turn(busy, busy, answer(PNG)),
        "/busy.png": busy,
        "/polite.png": in_turn(answer(b"", status=status, Retry_After="7"), answer(OTHER)),
    }
    waits = Waits()
    assert fetch(server.url("/a.png"), media_policy, sleep=waits).read_bytes() == PNG
    assert waits == [0.5, 1.0]
    waits = Waits()
    assert fetch(server.url("/polite.png"), media_policy, sleep=waits).read_bytes() == OTHER
    assert waits == [7.0]
    shutil.rmtree(media_policy.cache_dir)
    assert f"the server answered {status}" in refused(server.url("/busy.png"), media_policy)
    assert server.num_asked("/busy.png") == ATTEMPTS == 3


@pytest.mark.parametrize("status", [204, 400, 401, 403, 404, 410, 416])
def test_other_answers_end_it_at_once(status, server, media_policy):
    server.pages["/a.png"] = answer(b"" if status == 204 else PNG, status=status)
    assert f"the server answered {status} " in refused(server.url("/a.png"), media_policy)
    assert server.num_asked("/a.png") == 1


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 1000)


def in_chunks(handler: Handler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for start in range(0, len(PNG), 7):
        piece = PNG[start : start + 7]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    handler.wfile.write(b"0\r\n\r\n")


def test_too_large_a_download_is_refused(server, media_policy):
    server.pages |= {
        "/endless": endless,
        "/says-so": answer(b"", Content_Length="10001"),
        "/exact": answer(PNG),
    }
    for path in ("/endless", "/says-so"):
        reason = refused(server.url(path), media_policy)
        assert "too large" in reason and "at most 10000 (data.max_download_bytes)" in reason
        assert server.num_asked(path) == 1
    exact = replace(media_policy, max_download_bytes=len(PNG))
    assert fetch(server.url("/exact"), exact).read_bytes() == PNG
    with pytest.raises(VlmtuneError, match="too large"):  # the same where it is kept already
        fetch(server.url("/exact"), replace(media_policy, max_download_bytes=len(PNG) - 1))


def test_a_body_in_chunks_is_put_together(server, media_policy):
    server.pages["/a.png"] = in_chunks
    assert fetch(server.url("/a.png"), media_policy).read_bytes() == PNG


def test_a_connection_that_breaks_off_is_tried_again(server, media_policy):
    cut = answer(PNG[:30], Content_Length=str(len(PNG)))
    nothing = lambda handler: None  # noqa: E731
    server.pages |= {"/a.png": in_turn(cut, nothing, answer(PNG)), "/cut.png": cut}
    assert fetch(server.url("/a.png"), media_policy, sleep=Waits()).read_bytes() == PNG
    shutil.rmtree(media_policy.cache_dir)
    assert "it ended early), 3 times" in refused(server.url("/cut.png"), media_policy)


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_sends_a_byte_now_and_then_is_not_waited_for(part, server, media_policy):
    stop = threading.Event()

    def slow(handler: Handler) -> None:
        if part == "body":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        while not stop.wait(0.02):
            handler.wfile.write(b"x")

    server.pages["/a.png"] = slow
    hasty = replace(media_policy, url_timeout_seconds=0.2)  # each byte comes well within it
    reason = refused(server.url("/a.png"), hasty)
    stop.set()
    assert "took longer than 0.2 seconds, 3 times" in reason
    assert "data.url_timeout_seconds" in reason


def test_the_content_counts_and_not_what_the_server_calls_it(server, media_policy):
    server.pages["/a"] = answer(PNG, Content_Type="text/html")
    assert fetch(server.url("/a"), media_policy).read_bytes() == PNG


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><html><p>Please log in", "returns an HTML page"),
        (b'{"error": "no such picture"}', "returns JSON"),
        (b"", "the download is empty"),
    ],
)
def test_a_page_instead_of_a_picture_is_refused_and_not_kept(content, reason, server, media_policy):
    server.pages["/a.png"] = in_turn(answer(content, Content_Type="image/png"), answer(PNG))
    assert reason in refused(server.url("/a.png"), media_policy)
    assert fetch(server.url("/a.png"), media_policy).read_bytes() == PNG


def test_user_and_password_go_to_the_server_and_into_no_message(server, media_policy):
    server.pages |= {"/a.png": answer(PNG), "/on": redirect(server.url("/a.png", "localhost"))}
    url = server.url("/a.png?key=hidden", "me:p%40ss@127.0.0.1")
    fetch(url, media_policy)
    assert server.seen[0][1]["Authorization"] == "Basic bWU6cEBzcw=="  # me:p@ss
    assert server.seen[0][0] == "/a.png?key=hidden"
    fetch(server.url("/on", "me:other@127.0.0.1"), media_policy)
    assert "Authorization" not in server.seen[2][1]  # another host
    server.pages["/a.png"] = answer(b"", status=404)
    shutil.rmtree(media_policy.cache_dir)
    reason = refused(url, media_policy)
    assert "p%40ss" not in reason and "hidden" not in reason
    assert f"http://127.0.0.1:{server.port}/a.png?…" in reason


def test_blanks_and_other_scripts_in_a_url_are_written_as_the_web_does(server, media_policy):
    server.pages["/a%20b/%C3%BC.png"] = answer(PNG)
    assert fetch(server.url("/a b/ü.png?q=1 2#part"), media_policy).read_bytes() == PNG
    assert server.seen[0][0] == "/a%20b/%C3%BC.png?q=1%202"
    assert fetch(server.url("/a%20b/%C3%BC.png"), media_policy).read_bytes() == PNG


def test_a_host_that_is_not_there_is_named(media_policy, monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    waits = Waits()
    with pytest.raises(VlmtuneError, match="name cannot be resolved.*http://gone.example/a.png"):
        fetch("http://gone.example/a.png", media_policy, sleep=waits)
    assert waits == []


def test_a_folder_that_cannot_be_used_is_named(server, media_policy, tmp_path):
    server.pages["/a.png"] = answer(PNG)
    (tmp_path / "file").touch()
    with pytest.raises(VlmtuneError, match="folder of downloads.*data.cache_dir"):
        fetch(server.url("/a.png"), replace(media_policy, cache_dir=tmp_path / "file"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`local.pem` for localhost and `other.pem` for another host, each with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("certificates")
    for name, host in (("local", "localhost"), ("other", "elsewhere.example")):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
        command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", f"/CN={host}"]
        command += ["-addext", f"subjectAltName=DNS:{host}"]
        command += ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")]
        subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("shown", "trusted", "host", "reason"),
    [
        ("local", "local", "localhost", None),
        ("local", "local", "elsewhere.example", "Hostname mismatch"),
        ("local", "local", "127.0.0.1", "IP address mismatch"),
        ("other", "other", "elsewhere.example", None),
        ("other", "other", "localhost", "Hostname mismatch"),
        ("local", "other", "localhost", "self-signed certificate"),
    ],
)
def test_https_wants_a_trusted_certificate_of_the_hosts_name(
    shown, trusted, host, reason, certificates, media_policy, monkeypatch
):
    named(monkeypatch, **{"elsewhere.example": [["127.0.0.1"]]})
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / f"{trusted}.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificates / f"{shown}.pem", certificates / f"{shown}.key")
    with serving(tls) as server:
        server.pages["/a.png"] = answer(PNG)
        url = server.url("/a.png", host)
        if reason is None:
            assert fetch(url, media_policy).read_bytes() == PNG
        else:
            assert reason in refused(url, media_policy)
            assert server.seen == []
