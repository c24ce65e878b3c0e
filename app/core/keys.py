"""API keys: how one looks, how it is made, and whom it lets in for what. Rows are app.db.api_keys', headers app.api.door's.

A key is `p2d_ID_SECRET`. The ledger keeps HMAC-SHA256(pepper, key): a copy of the database opens nothing, and without the
pepper no guess can be tried on it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from app.access_errors import InsufficientScope, KeyRefused
from app.db import audit
from app.db.api_keys import ApiKey, Scope, any_key, get_key, insert_key, note_use
from app.db.engine import Connection
from app.db.ids import new_id
from app.db.projects import DEFAULT_PROJECT
from app.errors import PepperMissing
from app.settings import Settings

KEY_PATTERN = re.compile(r"p2d_([0-9a-hjkmnp-tv-z]{26})_[a-z2-7]{52}")
"""What a key looks like: for us and for secret scanners."""

SECRET_BYTES = 32

_RANK: dict[Scope, int] = {"read": 0, "write": 1, "admin": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who sends a request."""

    project_id: str
    scope: Scope
    key_id: str | None
    """None: the service has no keys yet, and the caller is on this machine."""

    @property
    def actor(self) -> str:
        """How the audit log calls the caller."""
        return self.key_id or audit.KEYLESS

    def need(self, scope: Scope) -> None:
        """Raise InsufficientScope unless the caller may do what needs this scope; each includes those before it."""
        if _RANK[self.scope] < _RANK[scope]:
            raise InsufficientScope(needed=scope, has=self.scope)


KEYLESS = Caller(project_id=DEFAULT_PROJECT, scope="admin", key_id=None)
"""The caller on loopback while no key has been made."""


def make_key(
    conn: Connection,
    settings: Settings,
    *,
    project_id: str,
    scope: Scope,
    name: str = "",
    expires_days: float | None = None,
) -> tuple[ApiKey, str]:
    """Record a new key; returns it and its text, which nobody can read again. Raises PepperMissing."""
    pepper = open_pepper(settings, in_use=any_key(conn))
    key_id = new_id("key")
    secret = base64.b32encode(secrets.token_bytes(SECRET_BYTES)).decode().rstrip("=").lower()
    text = f"p2d_{key_id.removeprefix('key_')}_{secret}"
    key = insert_key(
        conn,
        id=key_id,
        project_id=project_id,
        scope=scope,
        name=name,
        secret_hmac=_hmac(pepper, text),
        expires_days=expires_days,
    )
    return key, text


def check_key(conn: Connection, pepper: bytes | None, text: str) -> Caller:
    """Whom a key lets in. Raises KeyRefused; why, is told only to those who have the whole key."""
    match = KEY_PATTERN.fullmatch(text)
    key = get_key(conn, f"key_{match.group(1)}") if match else None
    # As long for a key that is not there: only the secret decides, and it is compared in constant time.
    expected, found = (key.secret_hmac if key else "0" * 64), _hmac(pepper or b"", text)
    if not hmac.compare_digest(expected, found) or key is None or pepper is None:
        raise KeyRefused("The API key is not one of this service.")
    if key.state != "active":
        raise KeyRefused(f"The API key is {key.state}.", state=key.state)
    note_use(conn, key)
    return Caller(project_id=key.project_id, scope=key.scope, key_id=key.id)


def read_pepper(settings: Settings) -> bytes | None:
    """What makes the HMACs of this service its own: from the settings, else from a file in home; None: there is none yet."""
    if settings.key_pepper is not None:
        return settings.key_pepper.get_secret_value().encode()
    try:
        return (settings.home / "key-pepper").read_bytes()
    except FileNotFoundError:
        return None


def open_pepper(settings: Settings, *, in_use: bool) -> bytes:
    """`read_pepper`, made where there is none yet. Raises PepperMissing if something that is in use needs the lost one."""
    pepper = read_pepper(settings)
    if pepper is None:
        if in_use:
            raise PepperMissing()
        pepper = _make_pepper(settings.home)
    return pepper


def _make_pepper(home: Path) -> bytes:
    path, pepper = home / "key-pepper", secrets.token_hex(32).encode()
    home.mkdir(parents=True, exist_ok=True)
    # It gets its name when it is whole, and never replaces another: a twin that was faster keeps its own.
    partial = path.with_name(f"key-pepper.{os.getpid()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pepper)
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        partial.unlink()
    return path.read_bytes()


def _hmac(pepper: bytes, text: str) -> str:
    return hmac.new(pepper, text.encode(), hashlib.sha256).hexdigest()
