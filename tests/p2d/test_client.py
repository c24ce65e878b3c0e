"""The client against a real HTTP server on loopback that cuts connections, answers 503 and lies when told to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from p2d.client import (
    Artifact,
    Client,
    DownloadCorrupt,
    NoSuchFile,
    ServiceProblem,
    ServiceUnreachable,
    without_defaults,
)
from p2d.config import HeadsConfig, JobConfig, TrainingConfig

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ARTIFACT = Artifact(id="art_1", name="heads.safetensors", sha256=SHA256, size_bytes=len(CONTENT))
JOB = {"id": "job_1", "kind": "adapt", "status": "queued", "stage": None, "progress": 0.0}

Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request, handed to the next answer of the script; the last answer stays."""

    script: list[Answer]
    seen: list[Request]
    body: bytes

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append(self)
        (self.script.pop(0) if len(self.script) > 1 else self.script[0])(self)
        self.close_connection = True

    do_GET = do_POST = handle_any

    def say(self, status: int, body: bytes, *, cut_at: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[:cut_at])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("Scripted", (Request,), {"script": [], "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def seen(server: ThreadingHTTPServer) -> list[Request]:
    return server.RequestHandlerClass.seen  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def answer(server: ThreadingHTTPServer) -> Callable[..., None]:
    def set_script(*answers: Answer) -> None:
        server.RequestHandlerClass.script = list(answers)  # type: ignore[attr-defined]

    return set_script


@pytest.fixture
def client(server: ThreadingHTTPServer) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{server.server_port}", retries=3, sleep=lambda seconds: None) as client:
        yield client


def ok(value: object) -> Answer:
    return lambda request: request.say(200, json.dumps(value).encode())


def problem(status: int, code: str, **members: object) -> Answer:
    return lambda request: request.say(status, json.dumps({"code": code, "detail": "No.", **members}).encode())


def content(request: Request, *, cut_at: int | None = None, body: bytes = CONTENT) -> None:
    start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
    request.say(206 if start else 200, body[start:], cut_at=cut_at)


def event(seq: int, kind: str) -> bytes:
    return f'id: {seq}\nevent: {kind}\ndata: {{"n": {seq}}}\n\n'.encode()


def test_a_problem_is_raised_with_all_that_the_service_said(client: Client, answer: Callable[..., None]) -> None:
    fault = {"code": "row.empty_answer", "message": "Empty.", "line": 317}
    answer(problem(422, "dataset.invalid", fault="user", hint="Mend.", errors=[fault], request_id="req_1"))

    with pytest.raises(ServiceProblem, match=r"No\.") as raised:
        client.job("job_1")

    assert (raised.value.status, raised.value.code, raised.value.fault) == (422, "dataset.invalid", "user")
    assert raised.value.errors[0].line == 317
    assert raised.value.request_id == "req_1"


def test_an_answer_that_may_pass_is_asked_for_again(
    client: Client, answer: Callable[..., None], seen: list[Request]
) -> None:
    answer(problem(503, "database.unavailable"), problem(503, "database.unavailable"), ok(JOB))

    assert client.job("job_1").status == "queued"
    assert len(seen) == 3


def test_retries_end(client: Client, answer: Callable[..., None], seen: list[Request]) -> None:
    answer(problem(503, "database.unavailable"))

    with pytest.raises(ServiceProblem):
        client.job("job_1")

    assert len(seen) == 4


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        Client("http://127.0.0.1:1", retries=1, sleep=lambda seconds: None) as client,
        pytest.raises(ServiceUnreachable, match=r"127\.0\.0\.1:1"),
    ):
        client.job("job_1")


def test_a_mapping_goes_with_the_file(
    client: Client, answer: Callable[..., None], seen: list[Request], tmp_path: Path
) -> None:
    data = tmp_path / "train.csv"
    data.write_text("Frage,answer\nq,a\n")
    answer(ok(JOB), ok({"id": "ds_1"}))

    client.submit({"kind": "adapt", "base_model": "m"}, dataset=data, mapping={"prompt": "Frage"})
    client.upload(data, mapping={"prompt": "Frage"})

    job, dataset = seen
    assert b'"mapping": {"prompt": "Frage"}' in job.body
    assert b'name="mapping"' in dataset.body
    assert b'{"prompt": "Frage"}' in dataset.body


def test_a_submit_that_was_cut_is_sent_again_whole_with_the_same_key(
    client: Client, answer: Callable[..., None], seen: list[Request], tmp_path: Path
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n')
    answer(lambda request: None, ok(JOB))  # reads it all, then hangs up without an answer

    job = client.submit({"kind": "adapt", "base_model": "m"}, dataset=data)

    assert job.id == "job_1"
    first, second = seen
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"]
    for request in (first, second):
        assert data.read_bytes() in request.body
        assert b'"base_model": "m"' in request.body


def test_events_go_on_behind_the_last_one_seen(
    client: Client, answer: Callable[..., None], seen: list[Request]
) -> None:
    def torn(request: Request) -> None:
        # The third event is cut before its blank line: it must come again, not half.
        request.say(
            200,
            b"retry: 1000\n\n" + event(1, "job.status") + b": ping\n\n" + event(2, "job.stage") + event(3, "x")[:-1],
        )

    answer(torn, lambda request: request.say(200, event(3, "job.progress") + event(4, "end")))

    events = list(client.events("job_1"))

    assert [(each.seq, each.type) for each in events] == [
        (1, "job.status"),
        (2, "job.stage"),
        (3, "job.progress"),
        (4, "end"),
    ]
    assert [request.headers.get("Last-Event-ID") for request in seen] == [None, "2"]


def test_an_end_in_the_middle_of_the_log_does_not_end_the_events(client: Client, answer: Callable[..., None]) -> None:
    retried = event(1, "end") + event(2, "job.status") + event(3, "end")
    answer(lambda request: request.say(200, retried))

    assert [each.seq for each in client.events("job_1")] == [1, 2, 3]


def test_a_stream_that_is_cut_behind_the_end_is_over_when_the_service_says_so(
    client: Client, answer: Callable[..., None], seen: list[Request]
) -> None:
    cut = event(1, "end") + b": ping"
    answer(lambda request: request.say(200, cut, cut_at=len(cut) - 1), lambda request: request.say(204, b""))

    assert [each.seq for each in client.events("job_1")] == [1]
    assert len(seen) == 2


def test_a_stream_that_never_gets_further_is_given_up(client: Client, answer: Callable[..., None]) -> None:
    answer(lambda request: request.say(200, b""))

    with pytest.raises(ServiceUnreachable):
        list(client.events("job_1"))


def test_a_cut_download_goes_on_where_it_stopped(
    client: Client, answer: Callable[..., None], seen: list[Request], tmp_path: Path
) -> None:
    half = len(CONTENT) // 2
    answer(lambda request: content(request, cut_at=half), content)

    path = client.fetch(ARTIFACT, tmp_path / "heads.safetensors")

    assert path.read_bytes() == CONTENT
    assert [request.headers.get("Range") for request in seen] == [None, f"bytes={half}-"]
    assert [each.name for each in tmp_path.iterdir()] == ["heads.safetensors"]


def test_a_download_goes_on_from_no_part_of_another_file_of_its_name(
    client: Client, answer: Callable[..., None], seen: list[Request], tmp_path: Path
) -> None:
    other = replace(ARTIFACT, sha256="0" * 64)
    answer(lambda request: content(request, cut_at=5, body=CONTENT[::-1]), lambda request: request.say(206, b""))
    with pytest.raises(ServiceUnreachable):
        client.fetch(other, tmp_path / "heads.safetensors")
    assert [each.stat().st_size for each in tmp_path.iterdir()] == [5]

    answer(content)
    assert client.fetch(ARTIFACT, tmp_path / "heads.safetensors").read_bytes() == CONTENT
    assert seen[-1].headers.get("Range") is None


def test_a_download_with_other_bytes_is_refused(client: Client, answer: Callable[..., None], tmp_path: Path) -> None:
    answer(lambda request: content(request, body=CONTENT[::-1]))

    with pytest.raises(DownloadCorrupt):
        client.fetch(ARTIFACT, tmp_path / "heads.safetensors")

    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_job_does_not_have_is_named(
    client: Client, answer: Callable[..., None], tmp_path: Path
) -> None:
    answer(ok({"data": [], "has_more": False, "next_cursor": None}))

    with pytest.raises(NoSuchFile, match=r"heads\.safetensors"):
        client.download("job_1", tmp_path / "out", names=["heads.safetensors"])

    assert not (tmp_path / "out").exists()


def test_lists_are_read_to_their_last_page(client: Client, answer: Callable[..., None], seen: list[Request]) -> None:
    answer(
        ok({"data": [JOB], "has_more": True, "next_cursor": "c1"}),
        ok({"data": [JOB | {"id": "job_0"}], "has_more": False, "next_cursor": None}),
    )

    assert [job.id for job in client.jobs(status="queued")] == ["job_1", "job_0"]
    assert [request.path for request in seen] == ["/jobs?status=queued", "/jobs?status=queued&cursor=c1"]


def test_a_config_is_sent_as_what_differs_from_the_defaults() -> None:
    config = JobConfig(kind="identify_heads", heads=HeadsConfig(ratio=0.2))

    assert without_defaults(config) == {"kind": "identify_heads", "heads": {"ratio": 0.2}}
    whole = JobConfig(training=TrainingConfig(rank=None))
    assert without_defaults(whole) == {"kind": "adapt", "training": {"rank": None}}
