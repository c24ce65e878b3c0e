"""The whole service on this machine: embedded servers where no URL is set, the schema, the API and one worker.

`p2d up` and `p2d demo` are thin over this file. Each part is a process of its own; the API and the worker are started
again when they end, the servers are not: without its database nothing is left to serve.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from app.db.engine import Engine, make_engine
from app.embedded import free_port, running_postgres, start_postgres, start_valkey, start_valkey_again, wheel_binaries
from app.errors import ProcessFailed
from app.main import may_listen
from app.processes import Child, Supervisor, Terminated
from app.settings import Settings
from migrations import upgrade

REQUESTS = "requests"
"""Folder of `run` in which the processes of the API count their requests together."""

RESTARTS = 5
"""Most restarts of one part in RESTART_WINDOW_S; more means that starting again does not help."""

RESTART_WINDOW_S = 300.0

TEND_S = 0.5
"""Seconds between two looks at the parts."""


@dataclass(kw_only=True)
class Service:
    """A running service. Only `running` makes one."""

    url: str
    settings: Settings
    supervisor: Supervisor
    parts: dict[str, list[str]]
    """Command of each part that is started again when it ends."""
    failure: ProcessFailed | None = None
    """Why the service cannot go on, once that is so."""
    _restarts: dict[str, list[float]] = field(default_factory=dict)

    def pid(self, name: str) -> int:
        """Process id of a running part: postgres, valkey, api or worker."""
        return self.supervisor.child(name).process.pid

    def wait(self) -> None:
        """Serve until a signal or a failure ends it. Main thread only."""
        while True:
            signal.pause()

    def tend(self) -> list[str]:
        """Start again what has ended, and name it. Raises ProcessFailed when restarts do not help."""
        again = []
        for child in self.supervisor.ended():
            name = child.record.name
            times = [at for at in self._restarts.get(name, []) if time.monotonic() - at < RESTART_WINDOW_S]
            if len(times) >= RESTARTS:
                self.supervisor.check()
            self._restarts[name] = [*times, time.monotonic()]
            self.supervisor.stop_one(name)
            if name == "valkey":
                start_valkey_again(self.supervisor, wheel_binaries(), self.settings.url("broker_url"))
            elif name == "postgres":
                start_postgres(self.supervisor, wheel_binaries(), port=urlsplit(self.settings.url("database_url")).port)
            else:
                self.supervisor.spawn(name, self.parts[name], env=environment(self.settings))
            again.append(name)
        return again


@contextmanager
def running(settings: Settings, *, say: Callable[[str], None]) -> Iterator[Service]:
    """Start everything, tend it, hand it over, and stop everything, however the block ends.

    Args:    say: told what is happening, one line at a time.
    Raises:  ProcessFailed when a part does not start or stay; what had started is stopped again.
    """
    with Supervisor(settings.home) as supervisor:
        leaving = threading.Event()
        service: Service | None = None
        tender: threading.Thread | None = None
        try:
            service = _start(settings, supervisor, say)
            tender = threading.Thread(target=_tend, args=(service, leaving, say), name="tend")
            tender.start()
            yield service
        except Terminated:
            if service is None or service.failure is None:
                raise
            raise service.failure from None
        finally:
            with _patience():
                say("Stopping ...")
                leaving.set()
                if tender is not None:
                    tender.join()
                supervisor.stop()


@contextmanager
def ledger(settings: Settings) -> Iterator[Engine]:
    """The service's database, whether it runs or not: the one of the settings, else the embedded one of home.

    Raises: ProcessFailed.
    """
    with ExitStack() as stack:
        if settings.database_url is not None:
            url = settings.url("database_url")
        elif (running_url := running_postgres(settings.home)) is not None:
            url = running_url
        else:
            url = start_postgres(stack.enter_context(Supervisor(settings.home)), wheel_binaries())
        engine = make_engine(url)
        stack.callback(engine.dispose)
        upgrade(engine)
        yield engine


def _tend(service: Service, leaving: threading.Event, say: Callable[[str], None]) -> None:
    while not leaving.wait(TEND_S):
        try:
            for name in service.tend():
                say(f"Started {name} again: it had ended.")
        except ProcessFailed as error:
            service.failure = error
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # see raise_on_term
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            return


def environment(settings: Settings) -> dict[str, str]:
    """The environment in which a child process reads exactly these settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("P2D_")}
    if settings.api_processes > 1:  # what each of them counts, for the one that is asked (prometheus_client)
        env["PROMETHEUS_MULTIPROC_DIR"] = str(settings.home.absolute() / "run" / REQUESTS)
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if value is not None:
            env[f"P2D_{name.upper()}"] = _text(value)
    return env


def _text(value: object) -> str:
    """A setting as its variable says it."""
    if isinstance(value, SecretStr):
        return str(value.get_secret_value())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _start(settings: Settings, supervisor: Supervisor, say: Callable[[str], None]) -> Service:
    found: dict[str, object] = {}
    if settings.database_url is None:
        say("Starting PostgreSQL (embedded) ...")
        found["database_url"] = SecretStr(start_postgres(supervisor, wheel_binaries()))
    if settings.broker_url is None:
        say("Starting Valkey (embedded) ...")
        found["broker_url"] = SecretStr(start_valkey(supervisor, wheel_binaries()))
    if settings.store_url is None:
        found["store_url"] = SecretStr((settings.home / "store").absolute().as_uri())
    found["port"] = settings.port or free_port()
    settings = settings.model_copy(update=found)
    say("Bringing the schema up to date ...")
    engine = make_engine(settings.url("database_url"))
    upgrade(engine)
    engine.dispose()
    may_listen(settings)
    # -P: the caller's directory is not a place to import from.
    command = [sys.executable, "-P", "-m", "app.cli"]
    names = ["api", *(f"api-{number}" for number in range(2, settings.api_processes + 1))]
    parts = {**{name: [*command, "api"] for name in names}, "worker": [*command, "worker"]}
    say("Starting the API and a worker ...")
    shutil.rmtree(supervisor.run / REQUESTS, ignore_errors=True)
    (supervisor.run / REQUESTS).mkdir()
    for name, part in parts.items():
        supervisor.spawn(name, part, env=environment(settings))
    url = f"http://{_reachable(settings.host)}:{settings.port}"
    _wait_ready(supervisor, supervisor.child("api"), url)
    return Service(url=url, settings=settings, supervisor=supervisor, parts=parts)


def _wait_ready(supervisor: Supervisor, api: Child, url: str) -> None:
    with httpx.Client(base_url=url, timeout=2, trust_env=False) as http:

        def answers() -> bool:
            try:
                return http.get("/readyz").is_success
            except httpx.TransportError:
                return False

        supervisor.wait_until(api, answers)


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - told apart, not bound
    return f"[{host}]" if ":" in host else host


@contextmanager
def _patience() -> Iterator[None]:
    """While stopping, a second Ctrl-C must not leave servers behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.signal(name, signal.SIG_IGN) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def package_root() -> Path:
    """The checkout that this code runs from: where `examples/` lies."""
    return Path(__file__).resolve().parents[1]
