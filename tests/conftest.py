"""Real servers for every test: PostgreSQL and Valkey from wheels, or the machine's own programs.

`P2D_TEST_SERVERS=machine` runs PostgreSQL and Redis as this machine has them installed (a second server of ours, never
the machine's running one). `P2D_TEST_SEED=N` repeats a run's random choices; the seed stands in the report's header.
"""

from __future__ import annotations

import itertools
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports torch: tests share few cores, and one thread is also what makes sums repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
# A developer's own settings are not a test's.
for name in [name for name in os.environ if name.startswith("P2D_") and not name.startswith("P2D_TEST_")]:
    del os.environ[name]

import hypothesis
import psycopg
import pytest
import structlog

from app.db.engine import make_engine
from app.embedded import Binaries, machine_binaries, remove, start_postgres, start_valkey, sweep, wheel_binaries
from app.processes import Supervisor
from migrations import upgrade

if TYPE_CHECKING:
    from app.settings import Settings

SEED = int(os.environ.get("P2D_TEST_SEED") or secrets.randbelow(2**31))
os.environ["P2D_TEST_SEED"] = str(SEED)  # pytest-xdist's processes inherit it: one seed a run

# structlog's own default draws every variable of every frame: two seconds of CPU for each error that a service in here logs.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)

hypothesis.settings.register_profile("p2d", deadline=None, print_blob=True, max_examples=50)
hypothesis.settings.load_profile("p2d")


def pytest_report_header() -> list[str]:
    """Say what a repeat of this run needs."""
    return [f"P2D_TEST_SEED={SEED} P2D_TEST_SERVERS={os.environ.get('P2D_TEST_SERVERS', 'wheels')}"]


@pytest.fixture(scope="session")
def seed() -> int:
    """The one source of randomness in tests."""
    return SEED


@dataclass(frozen=True, slots=True)
class Servers:
    """The session's two servers; `database_url` is an empty database, `template_url` a migrated one to copy from."""

    database_url: str
    template_url: str
    broker_url: str
    numbers: Iterator[int] = field(default_factory=itertools.count)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Started once a session in a throw-away home; sessions beside it have their own."""
    parent = Path(tempfile.gettempdir()) / f"p2d-test-{os.geteuid()}"
    parent.mkdir(mode=0o711, exist_ok=True)
    sweep(parent)
    home = parent / f"{os.getpid()}-{secrets.token_hex(4)}"
    binaries = _machine_binaries() if os.environ.get("P2D_TEST_SERVERS") == "machine" else wheel_binaries()
    try:
        with Supervisor(home) as supervisor:
            broker_url = start_valkey(supervisor, binaries)
            database_url = start_postgres(supervisor, binaries, durable=False)
            template_url = _copy_database(database_url, "template1", "migrated")
            engine = make_engine(template_url)
            upgrade(engine)
            engine.dispose()
            yield Servers(database_url, template_url, broker_url)
    finally:
        remove(home)


@pytest.fixture(scope="module")
def database_url(servers: Servers) -> str:
    """A fresh, migrated database for this test module."""
    return _copy_database(servers.database_url, "migrated", f"test_{next(servers.numbers)}")


@pytest.fixture(scope="module")
def broker_url(servers: Servers) -> str:
    """A numbered database of the broker for this test module, of 63 in turn."""
    return servers.broker_url.removesuffix("/0") + f"/{next(servers.numbers) % 63 + 1}"


@pytest.fixture(scope="module")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty object store in a folder, for this test module."""
    return tmp_path_factory.mktemp("store").as_uri()


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The URL of a real S3 server; its keys are `tests.s3_server.KEYS`."""
    from tests.s3_server import s3_server

    with s3_server() as url:
        yield url


@pytest.fixture
def settings(database_url: str, broker_url: str, store_url: str, tmp_path: Path) -> Settings:
    """The service's settings on this module's servers, with a home of this test alone."""
    from app.settings import Settings

    return Settings.model_validate(
        {"database_url": database_url, "broker_url": broker_url, "store_url": store_url, "home": tmp_path / "home"}
    )


def _machine_binaries() -> Binaries:
    binaries = machine_binaries()
    if binaries is None:
        pytest.exit("P2D_TEST_SERVERS=machine, but this machine has no PostgreSQL server or no Redis.", returncode=2)
    return binaries


def _copy_database(url: str, template: str, name: str) -> str:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'.encode())
    return url.rpartition("/")[0] + f"/{name}"
