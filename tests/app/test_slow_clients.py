"""Laws of slow clients: none holds a connection for ever, each is told why, and nobody else waits for them."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest

from app.settings import Settings
from app.wire_protocol import PatientProtocol
from tests.app.conftest import Api, serving
from tests.rig import wait_for


class Hasty(PatientProtocol):
    head_s = 0.3
    look_s = 0.3
    body_s = 1.0


@pytest.fixture(scope="module")
def api(module_settings: Settings) -> Iterator[Api]:
    """A service with little patience."""
    with serving(module_settings, protocol=Hasty) as api:
        yield api


HEAD = b"POST /datasets HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'


def drip(api: Api, opening: bytes, piece: bytes) -> bytes:
    """Send the opening, then piece after piece until the service closes the connection; what it said."""
    host, port = api.url.removeprefix("http://").split(":")
    said = b""
    with socket.create_connection((host, int(port))) as client:
        client.settimeout(0.02)
        client.sendall(opening)
        while True:
            try:
                while some := client.recv(65536):
                    said += some
                return said
            except TimeoutError:
                with contextlib.suppress(ConnectionError):  # closed meanwhile: the next look tells
                    client.sendall(piece)
            except ConnectionError:
                return said


def problem_of(said: bytes) -> tuple[int, str]:
    """Status and code of the last answer."""
    head, _, body = said[said.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    return int(head.split()[1]), json.loads(body)["code"]


@pytest.mark.parametrize(
    ("opening", "piece"),
    [
        (b"GET /healthz HTTP/1.1\r\nX-Slow: ", b"x"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /version HTTP/1.1\r\nX-Slow: ", b"x"),
        (HEAD + b"Content-Length: 1000000\r\n\r\n" + PART, b"x"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(PART), PART),
            b"400\r\n" + 1024 * b"x" + b"\r\n",
        ),
    ],
    ids=["head", "head of a second request", "body", "chunks", "body without end"],
)
def test_a_client_that_drips_is_told_and_cut_off(api: Api, opening: bytes, piece: bytes) -> None:
    assert problem_of(drip(api, opening, piece)) == (408, "request.too_slow")

    wait_for(lambda: api.uploading() == [], "the end of the upload")


def test_a_client_that_says_nothing_is_cut_off_and_told_nothing(api: Api) -> None:
    assert drip(api, b"", b"") == b""


def test_a_body_that_goes_on_after_its_answer_is_cut_off(api: Api) -> None:
    said = drip(api, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", b"x")

    assert said.startswith(b"HTTP/1.1 200 ")


def test_what_is_no_http_is_answered_with_a_problem(api: Api) -> None:
    assert problem_of(drip(api, b"\x16\x03\x01 hello\r\n\r\n", b"x")) == (400, "request.malformed")


def test_a_client_of_ordinary_speed_is_not_hurried(api: Api) -> None:
    with api.http.stream("GET", f"/jobs/{api.job()}/events", headers={"Accept": "text/event-stream"}) as stream:
        # Half a second after the events: longer than a head may take.
        assert any(line == ": ping" for line in stream.iter_lines())
