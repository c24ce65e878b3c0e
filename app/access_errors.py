"""Errors of who may, and how much, and of a database that was not made ready for it. A branch of the tree in app.errors."""

from __future__ import annotations

from typing import Any, ClassVar

from app.errors import ServiceError, Unavailable
from p2d.errors import Fault


class NotAllowed(ServiceError):
    """The caller may not do this."""

    code, hint = "auth.not_allowed", "Ask the operator of the service."
    fault: ClassVar[Fault] = "user"


class KeyRefused(NotAllowed):
    """No API key, or one that opens nothing: unknown, expired or revoked."""

    code, hint = (
        "auth.key_refused",
        "Send `Authorization: Bearer p2d_...` (P2D_API_KEY for the command line and Client); `p2d keys create` makes a key.",
    )


class InsufficientScope(NotAllowed):
    """An API key that is good, but not for this."""

    code, hint = "auth.insufficient_scope", "Use a key of the scope in facts.needed."

    def __init__(self, *, needed: str, has: str) -> None:
        super().__init__(f"This needs the scope {needed!r}; the key has {has!r}.", needed=needed, has=has)


class TooMuch(ServiceError):
    """The caller's project has had enough for now."""

    code, hint = "limit.reached", "Wait, or ask the operator for more."
    fault: ClassVar[Fault] = "capacity"


class TooManyRequests(TooMuch):
    """More requests of one project in a minute than the service allows."""

    code, hint = "limit.requests", "Wait for the seconds in Retry-After; RateLimit tells how many requests are left."

    def __init__(self, *, per_minute: int, retry_after_s: int) -> None:
        text = f"The project sent more than {per_minute} requests in a minute."
        super().__init__(text, per_minute=per_minute, retry_after_s=retry_after_s)


class TooManyJobs(TooMuch):
    """More unfinished jobs of one project than the service allows."""

    code, hint = "limit.jobs", "Wait until jobs have ended, or cancel some."

    def __init__(self, *, limit: int) -> None:
        text = f"The project has {limit} jobs that have not ended, which is the most."
        super().__init__(text, limit=limit, retry_after_s=60)


class TooManyProjectStreams(TooMuch):
    """More open event streams of one project than one process of the service allows."""

    code, hint = "limit.streams", "Close streams, or read the events as pages."

    def __init__(self, *, limit: int) -> None:
        text = f"The project has {limit} event streams open here, which is the most."
        super().__init__(text, limit=limit, retry_after_s=30)


class StorageFull(TooMuch):
    """More stored bytes or dataset rows of one project than the service allows."""

    code, hint = "limit.storage", "Delete jobs or datasets that are no longer needed."

    def __init__(self, *, what: str, used: int, more: int, limit: int) -> None:
        text = f"The project stores {used} {what}; {more} more would be above its {limit}."
        super().__init__(text, what=what, used=used, more=more, limit=limit)


class NotMigrated(Unavailable):
    """The database lacks tables or columns of this version."""

    code, hint = (
        "database.not_migrated",
        "Let the operator run `p2d migrate` of this version on P2D_DATABASE_URL; the service then goes on by itself.",
    )

    def __init__(self, **facts: Any) -> None:
        super().__init__("The database has not been migrated to this version: run `p2d migrate`.", **facts)


class RoleMissing(ServiceError):
    """The database's user may neither make the role of the API nor take it on; met when migrating."""

    code, hint = (
        "database.role_missing",
        "Let an administrator of the server run the two statements once, then migrate again.",
    )

    def __init__(self, *, role: str, user: str) -> None:
        statements = f'CREATE ROLE {role} NOLOGIN; GRANT {role} TO "{user}";'
        text = f"The user {user!r} may not make the role {role!r}, or, where it is there, not take it on: {statements}"
        super().__init__(text, role=role, user=user)


class TablesInUse(ServiceError):
    """Somebody used a table for longer than a migration waits for it; nothing was changed."""

    code, hint = (
        "database.in_use",
        "Find the transaction that stays open (pg_stat_activity, the oldest xact_start), end it, and run `p2d migrate` again.",
    )
    fault: ClassVar[Fault] = "dependency"

    def __init__(self, *, seconds: float) -> None:
        super().__init__(f"A table that the migration changes was in use for {seconds:.0f} seconds.", seconds=seconds)
