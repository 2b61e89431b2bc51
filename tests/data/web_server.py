"""A web server on this machine for tests, that answers as a test says and remembers what it saw."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Handler = http.server.BaseHTTPRequestHandler
Page = Callable[[Handler], None]


@dataclass
class WebServer:
    """`pages` by path (the query left out); `seen`: the paths asked for and their headers."""

    port: int
    scheme: str = "http"
    pages: dict[str, Page] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def num_asked(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.seen)


def answer(content: bytes, *, status: int = 200, **headers: str) -> Page:
    """A whole answer; of a header `Retry_After`, the name is Retry-After."""

    def page(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return page


def redirect(location: str, *, status: int = 302) -> Page:
    return answer(b"", status=status, Location=location)


def in_turn(*pages: Page) -> Page:
    """Another answer each time; the last one over and over."""
    left = list(pages)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


@contextlib.contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[WebServer]:
    class Answers(Handler):
        def do_GET(self) -> None:
            server.seen.append((self.path, dict(self.headers)))
            # A client that has had enough closes the connection.
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                server.pages[self.path.partition("?")[0]](self)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a handshake that the client broke off

    with Quiet(("127.0.0.1", 0), Answers) as listening:
        server = WebServer(listening.server_port)
        if tls is not None:
            listening.socket = tls.wrap_socket(listening.socket, server_side=True)
            server.scheme = "https"
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        listening.shutdown()
        thread.join()
