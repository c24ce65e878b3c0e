"""What the service bears: latency, waiting, memory of streams and uploads; real servers on this machine's loopback.

    ./run load                    # five minutes on a quiet machine; writes docs/results/service.{json,md}
    ./run load --upload-gb 10     # the upload of ten gigabytes instead of one
    ./run load --quick            # small counts, to see that the harness works; its figures mean nothing

The whole service runs as `p2d up` runs it, in a home that is deleted afterwards; this process only speaks HTTP. The engine is one
that fails each job at once. Latency counts from the moment at which a request was due, so a stall is seen by all that wait behind
it. From POST to claim is `started_at - created_at`, both by the database's clock. Without a broker means: the broker is stopped
(SIGSTOP), so connections hang, which is worse than none. While requests are measured the worker stands still, by SIGSTOP too.
Memory is the resident set of the API's process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
from safetensors.numpy import save_file

from p2d.arch.llama import LLAMA
from p2d.errors import Diverged
from p2d.model_info import shape_of

ROOT = Path(__file__).resolve().parent.parent
RATE, SECONDS = 100, 20
THREADS = 16
API_PROCESSES = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the result."""

    name: str
    value: float
    unit: str
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached, where there is one."""
        return None if self.at_most is None else self.value <= self.at_most


def fail_at_once(call: Any, **more: Any) -> None:
    """The engine: what is measured ends with the claim."""
    raise Diverged("This engine computes nothing.")


@dataclass(frozen=True, slots=True)
class Running:
    """A running service and its processes."""

    url: str
    pids: dict[str, int]
    """Of parts: `worker`, `broker`, `api`, and names that begin so for its other processes."""

    def rss(self) -> int:
        """Resident bytes of the API, all processes together."""
        api = (pid for part, pid in self.pids.items() if part.startswith("api"))
        return sum(int(psutil.Process(pid).memory_info().rss) for pid in api)

    @contextlib.contextmanager
    def stopped(self, part: str) -> Iterator[None]:
        """A part that stands still."""
        os.kill(self.pids[part], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pids[part], signal.SIGCONT)

    def client(self) -> httpx.Client:
        """A connection of its own."""
        return httpx.Client(base_url=self.url, timeout=600, trust_env=False)


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(prog="./run load", description="What the service bears on this machine.")
    parser.add_argument("--upload-gb", type=float, default=1.0, help="size of the large upload (default 1)")
    parser.add_argument("--quick", action="store_true", help="small counts: tries the harness, measures nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where service.json and .md go")
    options = parser.parse_args(arguments)
    started, load = time.monotonic(), os.getloadavg()[0]
    figures: list[Figure] = []
    with service(options.upload_gb) as running:
        for part in parts(running, upload_gb=options.upload_gb, quick=options.quick):
            for figure in part():
                figures.append(figure)
                print(line_of(figure), flush=True)  # noqa: T201 - a command line
    facts = {
        "command": "./run load" + (" --quick" if options.quick else "") + f" --upload-gb {options.upload_gb:g}",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {API_PROCESSES} API processes",
        "load_before": load,
        "seconds": time.monotonic() - started,
        "figures": [{**asdict(figure), "met": figure.met} for figure in figures],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "service.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (options.out / "service.md").write_text(as_markdown(facts, figures), encoding="utf-8")


def parts(running: Running, *, upload_gb: float, quick: bool) -> list[Callable[[], list[Figure]]]:
    """What is measured, in order: claims first, while no job waits."""
    jobs, streams = (200, 50) if quick else (10_000, 2_000)
    seconds, claims, lonely = (2, 3, 1) if quick else (SECONDS, 50, 8)
    return [
        lambda: [Figure("POST to claim, idle worker, p99", claim_s(running, claims), "s", 1.0)],
        lambda: [Figure("POST to claim, no broker, p99", without_broker(running, lonely), "s", 20.0)],
        lambda: requests(running, seconds=seconds, jobs=jobs),
        lambda: [Figure(f"memory of one of {streams} event streams", stream_kb(running, streams), "KB", 40.0)],
        lambda: bad_lines(running),
        lambda: upload(running, int((0.02 if quick else upload_gb) * 1e9)),
    ]


# --- the service -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def service(upload_gb: float) -> Iterator[Running]:
    """The whole service in a throw-away home."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    home, port = Path(tempfile.mkdtemp(prefix="p2d-load-")), free_port()
    home.chmod(0o711)  # the database's user passes through
    write_stub_model(home / "models" / "small")
    env = {name: value for name, value in os.environ.items() if not name.startswith("P2D_")}
    env |= {"P2D_HOME": str(home), "P2D_PORT": str(port), "PYTHONPATH": str(ROOT), "P2D_QUOTA_JOBS": "1000000"}
    env |= {"P2D_API_PROCESSES": str(API_PROCESSES)}
    env |= {"P2D_ENGINE": "benchmarks.service:fail_at_once", "P2D_MAX_ROWS": "100000000"}
    most = str(int((2 * upload_gb + 1) * 1e9))
    env |= {"P2D_MAX_UPLOAD_BYTES": most, "P2D_CHECK_FILE_BYTES": most, "P2D_QUOTA_BYTES": str(10**12)}
    env |= {"P2D_CHECK_MAX_S": "7200"}
    log = (home / "up.log").open("w")
    process = subprocess.Popen([sys.executable, "-P", "-m", "app.cli", "up"], env=env, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: process.poll() is not None or answers(url), "the service")
        assert process.poll() is None, (home / "up.log").read_text()
        yield Running(url, pids(process.pid))
    finally:
        process.terminate()
        process.wait(60)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


def pids(root: int) -> dict[str, int]:
    """Process ids of the parts, by what their commands say."""
    found: dict[str, int] = {}
    for child in psutil.Process(root).children():
        command = " ".join(child.cmdline())
        for part, word in {"api": "app.cli api", "worker": "app.cli worker", "broker": "valkey"}.items():
            if word in command:
                found[f"{part}-{child.pid}" if part in found else part] = child.pid
    assert len(found) == API_PROCESSES + 2, found
    return found


def answers(url: str) -> bool:
    """Whether the service is ready."""
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).is_success
    except httpx.TransportError:
        return False


def write_stub_model(directory: Path, *, layers: int = 2) -> None:
    """A model that can be described, all weights zero: nobody loads it."""
    directory.mkdir(parents=True)
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
    more = {"model_type": "llama", "intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 128}
    config = sizes | more | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    matrices = dict(LLAMA.matrices(shape_of(config, name=directory.name)))
    save_file({name: np.zeros(shape, np.float32) for name, shape in matrices.items()}, directory / "model.safetensors")


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    """Return once it is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


# --- what is measured ------------------------------------------------------------------------------------------------


def claim_s(running: Running, count: int) -> float:
    """Seconds from a job's birth to its claim, one job after the other, p99."""
    waits = []
    with running.client() as http:
        body = a_job(http)
        for _ in range(count):
            place = http.post("/jobs", json=body).raise_for_status().headers["location"]
            wait_for(lambda: http.get(place).json()["finished_at"], "the end of a job")  # noqa: B023
            job = http.get(place).json()
            times = [datetime.fromisoformat(job[name]) for name in ("created_at", "started_at")]
            waits.append((times[1] - times[0]).total_seconds())
    return percentile(waits, 99)


def without_broker(running: Running, count: int) -> float:
    """The same while the broker hangs."""
    with running.stopped("broker"):
        return claim_s(running, count)


def requests(running: Running, *, seconds: int, jobs: int) -> list[Figure]:
    """POST /jobs at a steady rate, then the list among many jobs."""
    with running.client() as http, running.stopped("worker"):
        body = json.dumps(a_job(http)).encode()

        def post(connection: HTTPConnection) -> int:
            return status_of(connection, "POST", "/jobs", body)

        paced(running, 20 * THREADS, 0.02, post)  # pools of connections fill, statements are prepared
        times, refused = paced(running, RATE * seconds, 1 / RATE, post)
        paced(running, max(0, jobs - len(times)), 0, post)
        lists, _ = paced(running, 200, 0.05, lambda connection: status_of(connection, "GET", "/jobs?limit=100"))
    return [
        Figure(f"POST /jobs at {RATE} a second, p50", 1000 * percentile(times, 50), "ms"),
        Figure(f"POST /jobs at {RATE} a second, p99", 1000 * percentile(times, 99), "ms", 100.0),
        Figure("of these, answered with an error", refused, "requests", 0),
        Figure(f"GET /jobs, 100 of {jobs:,}, p95", 1000 * percentile(lists, 95), "ms", 50.0),
    ]


def paced(
    running: Running, count: int, every_s: float, ask: Callable[[HTTPConnection], int]
) -> tuple[list[float], int]:
    """Seconds that each of `count` requests took, counted from when it was due, and how many were answered with an error.

    By the standard library's client: httpx takes 3 ms of a core for a request, which the service on this machine then lacks.
    """
    own, start, place = threading.local(), time.monotonic() + 0.1, urlsplit(running.url)
    refused: list[int] = []

    def one(number: int) -> float:
        if not hasattr(own, "connection"):
            own.connection = HTTPConnection(place.hostname or "", place.port, timeout=600)
        due = start + number * every_s if every_s else time.monotonic()
        time.sleep(max(0.0, due - time.monotonic()))
        if ask(own.connection) >= 400:
            refused.append(number)
        return time.monotonic() - due

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(count))), len(refused)


def status_of(connection: HTTPConnection, method: str, path: str, body: bytes | None = None) -> int:
    """One request, its answer read to the end."""
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def stream_kb(running: Running, count: int) -> float:
    """Kilobytes of the API for each client that listens to a job that does not move."""
    with running.client() as http, running.stopped("worker"):
        place = http.post("/jobs", json=a_job(http)).raise_for_status().headers["location"]
        before = running.rss()
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", urlsplit(running.url).port or 0)))
                sock.settimeout(60)
                sock.sendall(
                    f"GET {place}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n".encode()
                )
                answer = sock.recv(4096)
                assert b" 200 " in answer, answer
            return (running.rss() - before) / count / 1000


def bad_lines(running: Running) -> list[Figure]:
    """A file of 100,000 rows of which 50 are wrong: one report names them all."""
    wrong = set(range(1000, 100_001, 1980)[:50])
    text = b"".join(b"{wrong\n" if number in wrong else row(number) for number in range(1, 100_001))
    with running.client() as http, growth(running) as grown:
        answer = http.post("/datasets", files={"file": ("rows.jsonl", text)}).json()
    found = {error["line"] for error in answer["errors"]}
    assert found == wrong, f"{len(found & wrong)} of {len(wrong)} wrong lines were named"
    return [
        Figure("wrong lines named, of 50 among 100,000", len(found), "lines"),
        Figure("memory of the API for that file", grown[0] / 1e6, "MB", 100.0),
    ]


def upload(running: Running, size: int) -> list[Figure]:
    """One large file through POST /datasets."""
    block = b"".join(row(number, 900) for number in range(1000))
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="large.jsonl"\r\n\r\n'

    def content() -> Iterator[bytes]:
        yield head
        for _ in range(size // len(block)):
            yield block
        yield b"\r\n--x--\r\n"

    started = time.monotonic()
    with running.client() as http, growth(running) as grown:
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = http.post("/datasets", content=content(), headers=kind, timeout=7200)
        assert answer.status_code == 201, answer.text[:500]
    return [
        Figure(f"memory of the API for an upload of {size / 1e9:g} GB", grown[0] / 1e6, "MB", 100.0),
        Figure("that upload, checked and stored", time.monotonic() - started, "s"),
    ]


@contextlib.contextmanager
def growth(running: Running) -> Iterator[list[int]]:
    """The most bytes by which the API grew within the block; looked at ten times a second."""
    before, most, over = running.rss(), [0], threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            most[0] = max(most[0], running.rss() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def a_job(http: httpx.Client) -> dict[str, Any]:
    """The body of a job over a small dataset."""
    text = b"".join(row(number) for number in range(60))
    dataset = http.post("/datasets", files={"file": ("rows.jsonl", text)}).raise_for_status().json()["id"]
    return {"kind": "adapt", "base_model": "small", "dataset": dataset, "reuse": "never"}


def row(number: int, length: int = 10) -> bytes:
    """One line of a dataset."""
    return f'{{"question": "What is {number} + 1?{" " * length}", "answer": "{number + 1}"}}\n'.encode()


def percentile(values: list[float], rank: int) -> float:
    """The value that `rank` percent do not exceed."""
    return sorted(values)[min(len(values) - 1, len(values) * rank // 100)]


# --- the result ------------------------------------------------------------------------------------------------------


def line_of(figure: Figure) -> str:
    """One figure as a line of a table."""
    target = "" if figure.at_most is None else f"<= {figure.at_most:g} {figure.unit}"
    verdict = {None: "", True: "met", False: "missed"}[figure.met]
    return f"| {figure.name} | {figure.value:.3g} {figure.unit} | {target} | {verdict} |"


def as_markdown(facts: dict[str, Any], figures: list[Figure]) -> str:
    """The page of the result."""
    about = f"`{facts['command']}`; {facts['machine']}; load average {facts['load_before']:.1f} before, {facts['seconds']:.0f} s."
    lines = ["# What the service bears", "<!-- Written by `./run load`; do not edit. -->", "", about, ""]
    lines += ["| figure | value | target | |", "| --- | ---: | ---: | --- |", *map(line_of, figures)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
