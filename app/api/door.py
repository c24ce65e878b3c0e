"""Who may come in: the API key of a request, or this machine alone while no key has been made.

One look at the ledger for each request, so a revoked key is refused at once. What a key is, says app.core.keys.
"""

from __future__ import annotations

import ipaddress
import re

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from app.access_errors import KeyRefused, NotAllowed, TooMuch
from app.api.bodies import drain
from app.core.keys import KEYLESS, Caller, check_key, read_pepper
from app.core.rates import Rates
from app.db.api_keys import any_key, still_opens
from app.db.engine import Engine
from app.settings import Settings

READING = ("GET", "HEAD")
"""Methods that a key of the scope `read` is enough for; all others need `write`."""

PROXIED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers by which a proxy tells that the request comes from elsewhere."""


class Door:
    """Admits requests. One for each process."""

    def __init__(self, settings: Settings, owner: Engine) -> None:
        # Each look is one statement: without a transaction round it, it is one word with PostgreSQL instead of three.
        self._settings, self._owner = settings, owner.execution_options(isolation_level="AUTOCOMMIT")
        self._rates = Rates(settings.url("broker_url"), per_minute=settings.rate_per_minute)
        self._has_keys = False
        """Once true it stays so: a key that was revoked still counts."""

    async def admit(self, request: Request) -> Caller:
        """Whose request this is. Raises KeyRefused, InsufficientScope, TooManyRequests."""
        try:
            return await run_in_threadpool(self._admit, request)
        except (NotAllowed, TooMuch):
            await drain(request.stream())  # who is still sending would else meet a reset instead of the answer
            raise

    def still_open(self, caller: Caller | None) -> None:
        """Raise KeyRefused if the key that let the caller in opens nothing any more: for what lasts longer than a moment."""
        if caller is not None and caller.key_id is not None:
            with self._owner.connect() as conn:
                if not still_opens(conn, caller.key_id):
                    raise KeyRefused("The API key opens nothing any more.")

    def _admit(self, request: Request) -> Caller:
        header = request.headers.get("authorization")
        with self._owner.connect() as conn:
            if header is None:
                self._has_keys = self._has_keys or any_key(conn)
                if self._has_keys:
                    raise KeyRefused("This needs an API key.")
                _refuse_strangers(request)
                return KEYLESS
            scheme, _, text = header.partition(" ")
            if scheme.lower() != "bearer":
                raise KeyRefused("Expected `Authorization: Bearer` with an API key.")
            caller = check_key(conn, read_pepper(self._settings), text.strip())
        allowed, allowance = self._rates.take(caller.project_id)
        request.scope["p2d.headers"] |= self._rates.headers(allowance)
        if not allowed:
            raise self._rates.refusal(allowance)
        caller.need("read" if request.method in READING else "write")
        return caller


def _refuse_strangers(request: Request) -> None:
    """Without keys, whoever can connect could do everything: so only who connects from this machine to loopback may.

    A proxy or a browser on this machine could be a stranger's hand. The proxy is told by its headers, of the browser the pages
    by Host (a name that now points here) and by Sec-Fetch-Site.
    """
    client, server = request.client, request.scope.get("server")
    if not (client and server and is_loopback(client.host) and is_loopback(server[0])):
        raise KeyRefused("The service has no API keys yet, so it answers on loopback only.")
    host = re.sub(r":\d+$", "", request.headers.get("host", ""))
    if not (host == "localhost" or is_loopback(host)):
        raise KeyRefused("The service has no API keys yet, so it answers to localhost, 127.0.0.1 and [::1] only.")
    if any(name in request.headers for name in PROXIED):
        raise KeyRefused("The service has no API keys yet, so it does not answer through a proxy.")
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise KeyRefused("The service has no API keys yet, so it does not answer to pages of other sites.")


def is_loopback(host: str) -> bool:
    """Whether an address or `localhost` is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
