"""The one door through which the service asks other hosts: https, allowed names, public addresses, bounded.

A name is resolved once, every address of it must be public, and it is a checked address that is dialled; TLS still asks for
the name. Redirects of a fetch are followed by hand, each as a new request; those of a post are not followed. No proxy, cookie
or credential goes along. Only hosts that the operator names as inside are asked at other addresses or ports, or over http.
What the bytes mean is nobody's business here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

from app.dataset_errors import EgressOff, SourceFailed, SourceInvalid, SourceRefused
from app.settings import Settings
from p2d.errors import DatasetTooLarge

MAX_REDIRECTS = 3
CHUNK_BYTES = 1 << 18
STALL_S = 20.0
"""Longest silence of the other side."""
HEARD_BYTES = 1 << 14
"""How much of the answer to a post is read, and thrown away: closing on a host that is still writing would reset it."""

T = TypeVar("T")

_NAME = re.compile(r"(?=.{4,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]", re.IGNORECASE)
_INSIDE = (".internal", ".local", ".localhost", ".localdomain", ".home.arpa")
_V6 = ipaddress.ip_network("2000::/3")
_NOT_V6 = [ipaddress.ip_network(text) for text in ("2001::/23", "2002::/16", "3fff::/20", "2001:db8::/32")]
"""Teredo and its neighbours, 6to4 (both hold an IPv4 address), documentation."""


def egress_of(settings: Settings) -> Egress:
    """The egress that the operator allows."""
    return Egress(allowed=settings.egress, max_bytes=settings.max_upload_bytes, max_s=settings.fetch_max_s)


def is_public(address: str) -> bool:
    """Whether an address belongs to the open Internet: no loopback, private, link-local, multicast or translated one."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        return found in _V6 and found.is_global and not any(found in network for network in _NOT_V6)
    return found.is_global and not found.is_multicast and not found.is_reserved


def is_allowed(host: str, allowed: Iterable[str]) -> bool:
    """Whether a pattern allows the host: its name, `*.name` for all below it, or `*` for every name."""
    host = host.lower()
    return any(
        pattern == "*" or host == pattern or (pattern.startswith("*.") and host.endswith(pattern[1:]))
        for pattern in (one.lower() for one in allowed)
    )


def system_addresses(host: str) -> list[str]:
    """All addresses of a name, as this machine resolves it. Raises OSError."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]


def system_dial(address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to an address. Raises OSError."""
    return socket.create_connection((address, port), timeout_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a URL names, once its text has been checked."""

    host: str
    port: int
    path: str
    """Without the query."""
    query: str
    encrypted: bool
    inside: bool
    """The operator named it: its address need not be public."""

    @property
    def asked(self) -> str:
        """What stands in the request line."""
        return (self.path or "/") + (f"?{self.query}" if self.query else "")


def target_of(url: str, *, allowed: Iterable[str], inside: Iterable[str] = ()) -> Target:
    """What a URL names, as far as its text tells whether it may be asked; addresses are checked when it is.

    Args:   inside: `host:port`, or `host` for the scheme's own port, that may be asked wherever they are, over http too.
    Raises: EgressOff, SourceInvalid, SourceRefused.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise SourceInvalid("The URL cannot be read.") from None
    if not url.isascii() or not url.isprintable() or " " in url:
        raise SourceInvalid("The URL holds characters that need to be encoded.")
    if parts.username is not None or parts.password is not None:
        raise SourceInvalid("The URL holds a user's name; credentials are not sent.")
    host, encrypted = parts.hostname or "", parts.scheme == "https"
    usual = 443 if encrypted else 80
    port = usual if port is None else port
    shown = f"[{host}]" if ":" in host else host
    names = {f"{shown}:{port}", *([shown] if port == usual else [])}
    known = parts.scheme in ("http", "https") and host != "" and not names.isdisjoint(one.lower() for one in inside)
    if not known:
        if not allowed:
            raise EgressOff()
        if not encrypted or port != 443:
            raise SourceInvalid("Only https on its own port is asked.")
        if not _NAME.fullmatch(host) or host.lower().endswith(_INSIDE):
            raise SourceRefused("The host is not a public name.")
        if not is_allowed(host, allowed):
            raise SourceRefused(f"The host {host} is not allowed.", host=host)
    return Target(host=host, port=port, path=parts.path, query=parts.query, encrypted=encrypted, inside=known)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """What was fetched."""

    url: str
    """Where the bytes came from in the end, without its query, which may hold a signature."""
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Egress:
    """Requests under one policy. `resolve`, `dial` and `context` are the world; whatever they say, addresses are checked."""

    allowed: tuple[str, ...]
    max_bytes: int
    max_s: float
    inside: tuple[str, ...] = ()
    """Hosts that may be asked wherever they are; see `target_of`."""
    resolve: Callable[[str], list[str]] = system_addresses
    dial: Callable[[str, int, float], socket.socket] = system_dial
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    def fetch(self, url: str, to: Path) -> Fetched:
        """Write what `url` holds into the file `to`.

        Raises: EgressOff, SourceInvalid, SourceRefused, SourceFailed, DatasetTooLarge.
        """
        until = time.monotonic() + self.max_s
        for _ in range(MAX_REDIRECTS + 1):
            target = self._target(url)
            found = self._ask(target, until, lambda connection: self._read(connection, target, to, until))  # noqa: B023
            if isinstance(found, Fetched):
                return found
            try:
                url = urljoin(url, found)
            except ValueError:
                raise SourceFailed(f"{target.host} redirects to what is no URL.") from None
        raise SourceFailed(f"The source redirects more than {MAX_REDIRECTS} times.")

    def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Post a body; the status of the answer, whatever it is, and nothing else of it.

        Raises: EgressOff, SourceInvalid, SourceRefused, SourceFailed.
        """
        target = self._target(url)

        def exchange(connection: http.client.HTTPConnection) -> int:
            connection.request("POST", target.asked, body, {"User-Agent": "p2d", "Connection": "close", **headers})
            with connection.getresponse() as answer:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    answer.read(HEARD_BYTES)
                return answer.status

        return self._ask(target, time.monotonic() + self.max_s, exchange)

    def _target(self, url: str) -> Target:
        return target_of(url, allowed=self.allowed, inside=self.inside)

    def _connect(self, target: Target, until: float) -> socket.socket:
        """A connection to an address of the host that may be asked, with TLS still to be begun."""
        host = target.host
        try:
            addresses = self.resolve(host)
        except (OSError, UnicodeError):
            raise SourceFailed(f"The name {host} has no address.") from None
        if not addresses or not (target.inside or all(is_public(address) for address in addresses)):
            raise SourceRefused(f"The name {host} has an address that is not public.", host=host)
        raw = self._dial(addresses, target.port, until)
        raw.settimeout(STALL_S)
        if not target.encrypted:
            return raw
        try:
            return self.context.wrap_socket(
                raw, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        except (OSError, ValueError):
            raw.close()
            raise

    def _dial(self, addresses: list[str], port: int, until: float) -> socket.socket:
        for address in addresses[:-1]:
            with contextlib.suppress(OSError):
                return self.dial(address, port, min(STALL_S, max(until - time.monotonic(), 0.001)))
        return self.dial(addresses[-1], port, min(STALL_S, max(until - time.monotonic(), 0.001)))

    def _ask(self, target: Target, until: float, exchange: Callable[[http.client.HTTPConnection], T]) -> T:
        """Connect to one host and let `exchange` speak with it, until then."""
        host = target.host
        connection = http.client.HTTPConnection(host, target.port)
        if target.encrypted:
            connection = http.client.HTTPSConnection(host, target.port, context=self.context)
        connection.auto_open = 0  # it must never connect by itself
        try:
            connection.sock = sock = self._connect(target, until)
            # Timeouts hold between two bytes; this ends a host that drips them, in the handshake and in headers too.
            alarm = threading.Timer(max(until - time.monotonic(), 0), _cut, [sock])
            alarm.daemon = True
            alarm.start()
            try:
                if isinstance(sock, ssl.SSLSocket):
                    sock.do_handshake()
                return exchange(connection)
            finally:
                alarm.cancel()
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
                raise  # our disk
            if time.monotonic() >= until:
                raise SourceFailed(f"{host} took more than {self.max_s:g} seconds.") from None
            raise SourceFailed(f"{host} cannot be asked: {type(error).__name__}.") from None
        finally:
            connection.close()

    def _read(self, connection: http.client.HTTPConnection, target: Target, to: Path, until: float) -> Fetched | str:
        connection.request("GET", target.asked, headers={"Accept-Encoding": "identity", "User-Agent": "p2d"})
        with connection.getresponse() as answer:
            if answer.status in (301, 302, 303, 307, 308) and (location := answer.getheader("Location")):
                return location
            if answer.status != 200:
                raise SourceFailed(f"{target.host} answered with {answer.status}.", status=answer.status)
            if (answer.length or 0) > self.max_bytes:
                raise self._too_large()
            found = self._save(answer, to)
            if time.monotonic() >= until:  # the alarm may have ended a body that does not say its length
                raise TimeoutError
            if answer.length:
                raise SourceFailed(f"{target.host} ended in the middle of the file.")
        return Fetched(url=f"https://{target.host}{target.path}", sha256=found[0], size_bytes=found[1])

    def _save(self, answer: http.client.HTTPResponse, to: Path) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        with to.open("wb") as file:
            while chunk := answer.read1(CHUNK_BYTES):
                size += len(chunk)
                if size > self.max_bytes:
                    raise self._too_large()
                digest.update(chunk)
                file.write(chunk)
        return digest.hexdigest(), size

    def _too_large(self) -> DatasetTooLarge:
        return DatasetTooLarge(f"The file has more than {self.max_bytes} bytes.", limit=self.max_bytes)


def _cut(sock: socket.socket) -> None:
    """End a connection under whoever reads it; the TLS layer is left alone, as another thread is in it."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
