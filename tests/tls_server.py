"""A TLS server for hosts that do not exist, on loopback, and an egress whose world is that server alone.

The addresses that names have are the test's; only the last act, dialling a checked address, ends at the server instead.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from app.core.egress import Egress

CERTIFICATE = Path(__file__).with_name("test_hosts.pem")
"""Of data.example, other.example, cdn.example and huggingface.co, signed by itself, with its key: worthless elsewhere."""

PUBLIC = "93.184.215.14"

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass(kw_only=True)
class World:
    """What the hosts hold, what their names resolve to, and what was dialled."""

    port: int = 0
    answers: dict[str, Answer] = field(default_factory=dict)
    addresses: dict[str, Callable[[], list[str]]] = field(default_factory=dict)
    dialled: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def egress(self, *allowed: str, **limits: Any) -> Egress:
        """An egress into this world."""
        return Egress(
            **{"allowed": allowed, "max_bytes": 1_000_000, "max_s": 20.0, **limits},
            resolve=lambda host: self.addresses.get(host, lambda: [PUBLIC])(),
            dial=self.dial,
            context=ssl.create_default_context(cafile=str(CERTIFICATE)),
        )

    def dial(self, address: str, port: int, timeout_s: float) -> socket.socket:
        """A connection to the server, whatever the address and port."""
        self.dialled.append(address)
        return socket.create_connection(("127.0.0.1", self.port), timeout_s)

    def serve(self, path: str, body: bytes) -> None:
        """Hold a file."""
        self.answers[path] = lambda handler: send(handler, 200, body)

    def redirect(self, path: str, to: str) -> None:
        """Redirect."""
        self.answers[path] = lambda handler: send(handler, 302, b"", Location=to)


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    """A whole answer."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@contextlib.contextmanager
def tls_world() -> Iterator[World]:
    """The server while the block runs."""
    world = World()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            world.asked.append(f"{self.headers['Host']}{self.path}")
            world.headers.append(dict(self.headers))
            world.bodies.append(self.rfile.read(int(self.headers["Content-Length"] or 0)))
            missing: Answer = lambda handler: send(handler, 404, b"")  # noqa: E731
            with contextlib.suppress(OSError):
                world.answers.get(self.path.partition("?")[0], missing)(self)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # clients that hang up are what is tested
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    world.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield world
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
