"""`p2d doctor`: what this machine has for P2D, part by part, and what is missing. Changes nothing but a scratch folder."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psycopg
import redis
from rich.console import Console
from rich.table import Table

from app.embedded import remove, start_postgres, start_valkey, wheel_binaries
from app.errors import ProcessFailed
from app.processes import Supervisor
from app.settings import Settings
from p2d.model_info import list_models

TORCH = """
import json, torch
print(json.dumps({
    "version": torch.__version__,
    "cuda_build": torch.version.cuda,
    "cuda": torch.cuda.is_available(),
    "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    "mps": torch.backends.mps.is_available(),
    "threads": torch.get_num_threads(),
}))
"""
"""Run by another process: this one stays free of torch."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One part of the machine."""

    part: str
    ok: bool
    text: str


def examine(settings: Settings, console: Console) -> bool:
    """Print every finding; whether all parts are fine."""
    table = Table("part", "", "finding", box=None)
    fine = True
    for finding in _findings(settings):
        fine = fine and finding.ok
        table.add_row(finding.part, "[green]ok[/]" if finding.ok else "[red]missing[/]", finding.text)
    console.print(table)
    return fine


def _findings(settings: Settings) -> Iterator[Finding]:
    version = sys.version_info
    yield Finding("python", version >= (3, 11), f"{platform.python_version()} on {platform.platform()}")
    yield Finding("p2d", True, metadata.version("p2d"))
    yield _torch()
    yield _try("home", lambda: _writable(settings.home))
    yield _try("database", lambda: _database(settings))
    yield _try("broker", lambda: _broker(settings))
    names = [name for name, _ in list_models(settings.models_dir)]
    yield Finding("models", True, f"{', '.join(names) or 'none yet'} (in {settings.models_dir})")


def _torch() -> Finding:
    done = subprocess.run([sys.executable, "-P", "-c", TORCH], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return Finding("torch", False, "not installed: pip install 'p2d[engine]'")
    facts = json.loads(done.stdout)
    build = f"CUDA {facts['cuda_build']} build" if facts["cuda_build"] else "CPU build"
    sees = facts["device"] or ("Apple GPU (MPS)" if facts["mps"] else "no GPU")
    return Finding("torch", True, f"{facts['version']}, {build}, sees {sees}, {facts['threads']} CPU threads")


def _try(part: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(part, True, look())
    except (OSError, ProcessFailed, psycopg.Error, redis.RedisError) as error:
        return Finding(part, False, str(error).strip())


def _writable(home: Path) -> str:
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=home):
        return str(home)


@contextmanager
def _scratch() -> Iterator[Supervisor]:
    home = Path(tempfile.mkdtemp(prefix="p2d-doctor-"))
    try:
        with Supervisor(home) as supervisor:
            yield supervisor
    finally:
        remove(home)


def _database(settings: Settings) -> str:
    if settings.database_url is None:
        with _scratch() as supervisor:
            return f"embedded: {_postgres_version(start_postgres(supervisor, wheel_binaries(), durable=False))}"
    return _postgres_version(settings.url("database_url"))


def _postgres_version(url: str) -> str:
    with psycopg.connect(url, connect_timeout=5) as conn:
        return f"PostgreSQL {conn.info.server_version // 10000}.{conn.info.server_version % 10000}"


def _broker(settings: Settings) -> str:
    if settings.broker_url is None:
        with _scratch() as supervisor:
            return f"embedded: {_redis_version(start_valkey(supervisor, wheel_binaries()))}"
    return _redis_version(settings.url("broker_url"))


def _redis_version(url: str) -> str:
    with redis.Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5) as client:
        facts = client.info("server")
        return f"{facts.get('server_name', 'redis')} {facts.get('valkey_version') or facts['redis_version']}"
