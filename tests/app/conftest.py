"""A real server over real servers, one for each test module, and what its tests send to it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from app.blobs import BlobStore
from app.core.egress import Egress
from app.db.engine import Engine, make_engine
from app.db.jobs import get_job
from app.main import create_app
from app.problems import MEDIA_TYPE
from app.settings import Settings
from app.wire_protocol import PatientProtocol
from benchmarks.service import write_stub_model
from tests.rig import FAST, wait_for
from tests.tls_server import World, tls_world
from workers.loop import Worker

MODEL = "stub"


@dataclass(frozen=True, slots=True)
class Api:
    """A running service, and the servers behind it for looking at."""

    http: httpx.Client
    settings: Settings
    engine: Engine
    blobs: BlobStore

    @property
    def url(self) -> str:
        """Where it listens."""
        return str(self.http.base_url).rstrip("/")

    def count(self, table: str) -> int:
        """Rows of a table."""
        with self.engine.connect() as conn:
            return int(conn.exec_driver_sql(f"select count(*) from {table}").scalar_one())

    def stored(self) -> set[str]:
        """Names of all objects in the (local) store."""
        root = Path(self.settings.url("store_url").removeprefix("file://"))
        return {path.name for path in root.rglob("*") if path.is_file()}

    def kept(self) -> set[str]:
        """The same, but for those of reports on refused files."""
        with self.engine.connect() as conn:
            return self.stored() - {row[0] for row in conn.exec_driver_sql("select sha256 from reports")}

    def uploading(self) -> list[Path]:
        """What uploads have left on the disk."""
        uploads = self.settings.work_dir / "uploads"
        # os.walk passes over what is swept under its feet; rglob would raise.
        return sorted(Path(folder) / name for folder, below, files in os.walk(uploads) for name in below + files)

    def upload(
        self, content: bytes, name: str = "data.jsonl", mapping: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """POST /datasets."""
        more = {"mapping": (None, json.dumps(mapping))} if mapping else {}
        return self.http.post("/datasets", files={"file": (name, content), **more})

    def dataset(self, count: int = 60, *, start: int = 0) -> str:
        """The id of a stored dataset of so many rows."""
        answer = self.upload(rows(count, start=start))
        assert answer.is_success, answer.text
        return str(answer.json()["id"])

    def post(self, body: Mapping[str, Any], **headers: str) -> httpx.Response:
        """POST /jobs with JSON."""
        return self.http.post("/jobs", json=body, headers=headers)

    def send(self, body: Mapping[str, Any], content: bytes, **more: bytes) -> httpx.Response:
        """POST /jobs with the dataset's file."""
        files = {"dataset": ("data.jsonl", content)} | {name: (f"{name}.jsonl", data) for name, data in more.items()}
        return self.http.post("/jobs", files={**files, "job": (None, json.dumps(body), "application/json")})

    def job(self, **fields: Any) -> str:
        """The id of a queued job."""
        answer = self.post(a_job(dataset=self.dataset(), **fields))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def _final(self, job_ids: Sequence[str]) -> bool:
        with self.engine.connect() as conn:
            return all((job := get_job(conn, job_id)) is not None and job.is_final for job_id in job_ids)

    def finish(self, *job_ids: str) -> None:
        """Let a worker with the stub engine run until these jobs have ended."""
        worker = Worker(self.settings)
        worker.start()
        try:
            # Not over HTTP: the server runs in this process too, and its answers would keep the worker from its work.
            wait_for(lambda: self._final(job_ids), f"the end of {', '.join(job_ids)}")
        finally:
            worker.stop()
            assert worker.join(30)

    def failed_job(self) -> str:
        """The id of a job that failed because its model's config was gone while it ran."""
        job_id = self.job()
        config, away = self.settings.models_dir / MODEL / "config.json", self.settings.models_dir / "away"
        config.rename(away)
        try:
            self.finish(job_id)
        finally:
            away.rename(config)
        return job_id


def a_job(**fields: Any) -> dict[str, Any]:
    """A job that the stub model's service accepts once it has a dataset."""
    return {"kind": "adapt", "base_model": MODEL, "heads": {"proxy_rows": 8}, **fields}


def rows(count: int, *, start: int = 0) -> bytes:
    """A dataset file in JSON Lines."""
    lines = [json.dumps({"question": f"What is {i} + 1?", "answer": str(i + 1)}) for i in range(start, start + count)]
    return ("\n".join(lines) + "\n").encode()


@contextlib.contextmanager
def serving(
    settings: Settings, egress: Egress | None = None, protocol: type[PatientProtocol] = PatientProtocol
) -> Iterator[Api]:
    """The service on a free port, in a thread."""
    write_stub_model_once(settings.models_dir / MODEL)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = create_app(settings, egress=egress)
    config = uvicorn.Config(
        app, http=protocol, log_config=None, ws="none", timeout_graceful_shutdown=3, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
    thread.start()
    wait_for(lambda: server.started or not thread.is_alive(), "the server")
    engine = make_engine(settings.url("database_url"))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        hooks = {"response": [is_described]}
        # The server closes idle connections after five seconds: one that is taken up again just then would be reset.
        limits = httpx.Limits(keepalive_expiry=1)
        with httpx.Client(base_url=url, timeout=30, trust_env=False, event_hooks=hooks, limits=limits) as http:
            yield Api(http, settings, engine, BlobStore.open(settings.url("store_url")))
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        engine.dispose()
    assert not thread.is_alive(), "the server did not stop"


def mark_of(api: Api, path: str) -> str:
    """What every cursor of a list of two or more begins with."""
    return str(api.http.get(path, params={"limit": 1}).json()["next_cursor"])[:6]


@functools.cache
def described() -> list[tuple[re.Pattern[str], dict[str, Any]]]:
    """What /openapi.json promises: operations by the form of their path, the most particular first."""
    servers = {"database_url": "postgresql://nowhere", "broker_url": "redis://nowhere", "store_url": "memory://"}
    paths = create_app(Settings.model_validate(servers)).openapi()["paths"]
    forms = sorted(paths, key=lambda path: (path.count("{"), -len(path)))
    return [(re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))), paths[path]) for path in forms]


def is_described(answer: httpx.Response) -> None:
    """Whatever a test provokes, the answer's status and code are those that the description names for the operation."""
    code = None
    if answer.headers.get("content-type") == MEDIA_TYPE and answer.request.method != "HEAD":
        code = json.loads(answer.read())["code"]
    if code in ("request.no_such_path", "request.method_not_allowed"):
        return  # not an operation
    path, method = answer.url.path, answer.request.method.lower()
    operation = next((found[method] for form, found in described() if form.fullmatch(path) and method in found), None)
    if operation is None:
        assert path == "/openapi.json" or method == "head", f"{method} {path} is not described"
        return
    found = operation["responses"].get(str(answer.status_code))
    assert found is not None, f"{method} {path} may not answer {answer.status_code} {code}"
    if code is not None:
        codes = found["content"][MEDIA_TYPE]["schema"]["properties"]["code"]["enum"]
        assert code in codes, f"{method} {path} may not answer {code}"


def write_stub_model_once(directory: Path) -> None:
    """The stub's model; a module's servers share it."""
    if not directory.exists():
        write_stub_model(directory)


@pytest.fixture(scope="module")
def module_settings(
    database_url: str, broker_url: str, store_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    """The service's settings for a whole module, with short time constants and a small upload limit."""
    home = tmp_path_factory.mktemp("home")
    servers = {"database_url": database_url, "broker_url": broker_url, "store_url": store_url, "home": home}
    limits = {
        "max_upload_bytes": 3_000_000,
        "max_row_bytes": 100_000,
        "max_json_bytes": 50_000,
        "upload_part_bytes": 1000,
    }
    return Settings.model_validate({**servers, **FAST, **limits, "sse_poll_s": 0.05, "sse_ping_s": 0.5})


@pytest.fixture(scope="module")
def api(module_settings: Settings) -> Iterator[Api]:
    """The module's service."""
    with serving(module_settings) as api:
        yield api


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Hosts that a service may be allowed to ask."""
    with tls_world() as world:
        yield world


@pytest.fixture(scope="module")
def fetching(module_settings: Settings, world: World) -> Iterator[Api]:
    """A service that may ask some of them."""
    with serving(module_settings, world.egress("data.example", "huggingface.co", "cdn.example")) as api:
        yield api


def memory_bytes() -> int:
    """Resident memory of this process, where the server runs too."""
    import psutil

    return int(psutil.Process(os.getpid()).memory_info().rss)
