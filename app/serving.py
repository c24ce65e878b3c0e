"""Answer HTTP: uvicorn with our limits, alone on its port or as one of several processes that share it."""

from __future__ import annotations

import gc
import socket

import uvicorn

from app.main import create_app
from app.settings import Settings
from app.wire_protocol import PatientProtocol, allow_connections


def serve(settings: Settings) -> None:
    """Answer until a signal. Raises SystemExit if the port cannot be had."""
    allow_connections()
    config = uvicorn.Config(
        create_app(settings),
        http=PatientProtocol,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=5,
        server_header=False,
        access_log=False,
        log_config=None,  # its lines take our form
    )
    server = uvicorn.Server(config)
    # What is there now stays: without this every full collection looks through it all, for a tenth of a second and more.
    gc.collect()
    gc.freeze()
    server.run([shared_socket(settings.host, settings.port)] if settings.api_processes > 1 else None)
    if not server.started:
        raise SystemExit(uvicorn.config.STARTUP_FAILURE)


def shared_socket(host: str, port: int) -> socket.socket:
    """A socket on a port that other processes of the same user have, too: the kernel deals new connections out."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(address)
    return sock
