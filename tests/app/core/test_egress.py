"""Laws of fetching: off unless allowed, https alone, public addresses alone, every redirect checked anew, all bounded."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from app.core.egress import Egress, is_allowed, is_public, target_of
from app.dataset_errors import EgressOff, SourceFailed, SourceInvalid, SourceRefused
from p2d.errors import DatasetTooLarge
from tests.tls_server import PUBLIC, World, tls_world

URL = "https://data.example/rows.jsonl"


@pytest.fixture
def world() -> Iterator[World]:
    with tls_world() as world:
        world.serve("/rows.jsonl", b"the rows")
        yield world


def test_a_file_is_fetched_whole_by_its_hosts_name_and_without_anything_of_ours(world: World, tmp_path: Path) -> None:
    found = world.egress("data.example").fetch(URL + "?signature=secret", tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == b"the rows"
    assert (found.sha256, found.size_bytes) == (hashlib.sha256(b"the rows").hexdigest(), 8)
    assert found.url == URL
    assert (world.asked, world.dialled) == (["data.example/rows.jsonl?signature=secret"], [PUBLIC])
    assert set(world.headers[0]) == {"Host", "Accept-Encoding", "User-Agent"}


def test_nothing_is_fetched_unless_the_operator_allows_a_host(world: World, tmp_path: Path) -> None:
    with pytest.raises(EgressOff):
        world.egress().fetch(URL, tmp_path / "file")
    with pytest.raises(SourceRefused):
        world.egress("other.example").fetch(URL, tmp_path / "file")

    assert world.dialled == []


@pytest.mark.parametrize(
    ("host", "patterns", "allowed"),
    [
        ("data.example", ["data.example"], True),
        ("DATA.example", ["data.EXAMPLE"], True),
        ("a.data.example", ["data.example"], False),
        ("a.b.data.example", ["*.data.example"], True),
        ("data.example", ["*.data.example"], False),
        ("evildata.example", ["*.data.example", "data.example"], False),
        ("data.example.evil.com", ["data.example", "*.data.example"], False),
        ("data.example", ["*"], True),
        ("data.example", ["*example", "data.*"], False),
    ],
)
def test_a_pattern_is_a_name_or_all_names_below_one(host: str, patterns: list[str], allowed: bool) -> None:
    assert is_allowed(host, patterns) is allowed


BAD_URLS = [
    *(
        "http://data.example/x",
        "ftp://data.example/x",
        "file:///etc/passwd",
        "gopher://data.example/",
        "//data.example/x",
    ),
    *(
        "https://data.example:8443/x",
        "https://data.example:22/",
        "https://data.example:99999/",
        "https://data.example:x/",
    ),
    *("https://user@data.example/", "https://user:pw@data.example/", "https://data.example\\@127.0.0.1/", "https://"),
    *(
        "https://data.example/a b",
        "https://data.example/\r\nX: y",
        "https://dät.example/",
        "https://data.ex\tample/",
        "",
    ),
]

BAD_HOSTS = [
    *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001", "0.0.0.0", "0"),
    *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[fe80::1%25eth0]", "[fd00::1]"),
    *("169.254.169.254", "2852039166", "[::ffff:a9fe:a9fe]", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1"),
    *("localhost", "localhost.localdomain", "metadata.google.internal", "printer.local", "a.localhost", "example"),
    *("1.1.1.1", "[2606:4700::1111]", "data.example.", "-a.example", "a..example", "a_b.example"),
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_only_plain_https_urls_are_fetched(world: World, tmp_path: Path, url: str) -> None:
    with pytest.raises((SourceInvalid, SourceRefused)):
        world.egress("*").fetch(url, tmp_path / "file")

    assert world.dialled == []


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_a_host_is_a_public_name_never_an_address_in_any_spelling(world: World, tmp_path: Path, host: str) -> None:
    with pytest.raises((SourceInvalid, SourceRefused)):
        world.egress("*").fetch(f"https://{host}/x", tmp_path / "file")

    assert world.dialled == []


PRIVATE = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.31.255.255", "192.168.0.1", "169.254.169.254"),
    *("100.100.100.200", "192.0.0.1", "192.0.2.1", "198.18.0.1", "203.0.113.1", "224.0.0.1", "240.0.0.1"),
    *("255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1"),
    *(
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2001::1",
        "2001:db8::1",
        "3fff::1",
        "fc00::1",
        "fd12::1",
        "fe80::1",
        "fe80::1%lo",
    ),
    *("fec0::1", "ff02::1", "100::1", "2130706433", "localhost", ""),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_with_an_address_that_is_not_public_is_never_dialled(world: World, tmp_path: Path, address: str) -> None:
    for answers in ([address], [PUBLIC, address]):
        world.addresses["data.example"] = lambda answers=answers: answers  # type: ignore[misc]
        with pytest.raises(SourceRefused, match="not public"):
            world.egress("*").fetch(URL, tmp_path / "file")

    assert world.dialled == []


def test_what_is_public_agrees_with_the_standard_library_but_is_never_wider() -> None:
    for number in range(256):
        for text in (f"{number}.7.7.7", f"{number}.0.0.1", f"{number:02x}{number:02x}::1"):
            if is_public(text):
                assert ipaddress.ip_address(text).is_global
    assert all(is_public(text) for text in ("8.8.8.8", "1.1.1.1", PUBLIC, "2606:4700:4700::1111", "2a00:1450::1"))


def test_a_name_that_changes_its_address_is_dialled_where_it_was_checked(world: World, tmp_path: Path) -> None:
    turns = iter([[PUBLIC], ["127.0.0.1"]])
    world.addresses["data.example"] = lambda: next(turns)

    world.egress("data.example").fetch(URL, tmp_path / "file")

    assert world.dialled == [PUBLIC]
    assert next(turns) == ["127.0.0.1"]  # asked once


def test_a_redirect_is_followed_where_it_may_lead(world: World, tmp_path: Path) -> None:
    world.redirect("/moved", "https://cdn.example/rows.jsonl")
    world.redirect("/near", "rows.jsonl")

    assert (
        world.egress("data.example", "cdn.example").fetch("https://data.example/moved", tmp_path / "a").size_bytes == 8
    )
    assert world.egress("data.example").fetch("https://data.example/near", tmp_path / "b").size_bytes == 8


@pytest.mark.parametrize(
    "to",
    [
        *("https://127.0.0.1/", "https://169.254.169.254/latest/meta-data/", "https://[::1]/", "https://2130706433/"),
        *("http://data.example/rows.jsonl", "//localhost/", "file:///etc/passwd", "https://other.example/rows.jsonl"),
        "https://inside.data.example/",
    ],
)
def test_a_redirect_is_checked_as_the_first_url_is(world: World, tmp_path: Path, to: str) -> None:
    world.redirect("/moved", to)
    world.addresses["inside.data.example"] = lambda: ["10.0.0.1"]

    with pytest.raises((SourceRefused, SourceInvalid)):
        world.egress("data.example", "*.data.example").fetch("https://data.example/moved", tmp_path / "file")

    assert world.dialled == [PUBLIC]


def test_a_name_is_resolved_and_checked_again_after_a_redirect_to_itself(world: World, tmp_path: Path) -> None:
    turns = iter([[PUBLIC], ["127.0.0.1"]])
    world.addresses["data.example"] = lambda: next(turns)
    world.redirect("/moved", "/rows.jsonl")

    with pytest.raises(SourceRefused):
        world.egress("data.example").fetch("https://data.example/moved", tmp_path / "file")

    assert world.dialled == [PUBLIC]


@pytest.mark.parametrize("to", ["https://[", "//[", "https://[bad]/x", "http://[::1"])
def test_a_redirect_to_what_is_no_url_is_the_hosts_fault(world: World, tmp_path: Path, to: str) -> None:
    world.redirect("/moved", to)

    with pytest.raises(SourceFailed, match=r"data\.example redirects to what is no URL"):
        world.egress("data.example").fetch("https://data.example/moved", tmp_path / "file")


def test_redirects_end(world: World, tmp_path: Path) -> None:
    world.redirect("/round", "/round")

    with pytest.raises(SourceFailed, match="more than 3 times"):
        world.egress("data.example").fetch("https://data.example/round", tmp_path / "file")

    assert len(world.asked) == 4


def test_a_host_with_another_hosts_certificate_is_not_believed(world: World, tmp_path: Path) -> None:
    with pytest.raises(SourceFailed, match="SSLCertVerificationError"):
        world.egress("*").fetch("https://wrong.example/rows.jsonl", tmp_path / "file")

    assert world.asked == []


@pytest.mark.parametrize("length", [None, 10_000_000, 10])
def test_a_file_above_the_limit_is_cut_off_whatever_it_says_of_its_size(
    world: World, tmp_path: Path, length: int | None
) -> None:
    def flood(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if length:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x" * 100_000)

    world.answers["/flood"] = flood
    if length == 10:  # what is said is all that is read
        assert world.egress("*").fetch("https://data.example/flood", tmp_path / "file").size_bytes == 10
        return
    with pytest.raises(DatasetTooLarge):
        world.egress("*").fetch("https://data.example/flood", tmp_path / "file")


def test_a_file_that_is_cut_off_is_not_taken_for_whole(world: World, tmp_path: Path) -> None:
    world.answers["/cut"] = lambda handler: _drip(handler, b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\nonly this")

    with pytest.raises(SourceFailed):
        world.egress("*").fetch("https://data.example/cut", tmp_path / "file")


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.0 200 OK\r\nX: ", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_a_host_that_drips_is_cut_off_at_the_deadline(world: World, tmp_path: Path, beginning: bytes) -> None:
    over = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        _drip(handler, beginning)
        while not over.wait(0.02):
            _drip(handler, b"x")

    world.answers["/drip"] = drip
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(over.set)
        with pytest.raises(SourceFailed, match="took more than"):
            world.egress("*", max_s=0.5).fetch("https://data.example/drip", tmp_path / "file")

    assert time.monotonic() - began < 8


@pytest.mark.parametrize("path", ["/missing", "/nonsense"])
def test_another_answer_is_a_failure_of_the_source(world: World, tmp_path: Path, path: str) -> None:
    world.answers["/nonsense"] = lambda handler: _drip(handler, b"no HTTP at all\r\n\r\n")

    with pytest.raises(SourceFailed):
        world.egress("*").fetch(f"https://data.example{path}", tmp_path / "file")


# --- what is posted -------------------------------------------------------------------------------------------------------


def test_a_post_tells_its_status_alone_and_follows_no_redirect(world: World) -> None:
    world.redirect("/moved", "https://169.254.169.254/")
    egress = world.egress("*")

    assert egress.post(URL, b"news", {"webhook-id": "x"}) == 200
    assert egress.post("https://data.example/moved?a=b", b"news", {}) == 302
    assert egress.post("https://data.example/missing", b"news", {}) == 404
    assert world.asked[:2] == ["data.example/rows.jsonl", "data.example/moved?a=b"]
    assert world.bodies == [b"news"] * 3
    assert world.headers[0]["webhook-id"] == "x"
    assert world.dialled == [PUBLIC] * 3


@pytest.mark.parametrize("url", [*BAD_URLS, *(f"https://{host}/x" for host in BAD_HOSTS)])
def test_a_post_goes_where_a_fetch_may(world: World, url: str) -> None:
    with pytest.raises((SourceInvalid, SourceRefused)):
        world.egress("*", inside=("127.0.0.1:9000", "hooks.lan")).post(url, b"news", {})

    assert world.dialled == []


@pytest.mark.parametrize("address", PRIVATE)
def test_a_post_to_a_name_with_an_address_that_is_not_public_is_never_dialled(world: World, address: str) -> None:
    world.addresses["data.example"] = lambda: [PUBLIC, address]

    with pytest.raises(SourceRefused, match="not public"):
        world.egress("*", inside=("hooks.lan",)).post(URL, b"news", {})

    assert world.dialled == []


@pytest.mark.parametrize(
    ("url", "inside", "known"),
    [
        ("http://127.0.0.1:9000/x", "127.0.0.1:9000", True),
        ("https://HOOKS.lan/x", "hooks.LAN", True),
        ("http://hooks.lan/x", "hooks.lan", True),
        ("http://hooks.lan:80/x", "hooks.lan", True),
        ("http://[::1]:9000/x", "[::1]:9000", True),
        ("https://hooks.lan:8443/x", "hooks.lan", False),
        ("http://127.0.0.1:9001/x", "127.0.0.1:9000", False),
        ("http://127.0.0.1/x", "127.0.0.1:9000", False),
        ("ftp://127.0.0.1:9000/x", "127.0.0.1:9000", False),
        ("http://2130706433:9000/x", "127.0.0.1:9000", False),
        ("http://a.hooks.lan/x", "hooks.lan", False),
        ("http://user@127.0.0.1:9000/x", "127.0.0.1:9000", False),
    ],
)
def test_a_host_inside_is_known_by_its_name_and_port(url: str, inside: str, known: bool) -> None:
    if known:
        assert target_of(url, allowed=(), inside=(inside,)).inside
        return
    with pytest.raises((EgressOff, SourceInvalid, SourceRefused)):
        target_of(url, allowed=(), inside=(inside,))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_receiver_that_drips_is_cut_off_at_the_deadline(world: World, scheme: str) -> None:
    over = threading.Event()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        while not over.wait(0.02):
            _drip(handler, b"x")

    world.answers["/drip"] = drip
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(over.set)
        if scheme == "http":
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # it accepts, and says nothing
            host = f"127.0.0.1:{listener.getsockname()[1]}"
            egress = Egress(allowed=(), inside=(host,), max_bytes=0, max_s=0.5)
        else:
            host, egress = "data.example", world.egress("*", max_s=0.5)
        with pytest.raises(SourceFailed, match="took more than"):
            egress.post(f"{scheme}://{host}/drip", b"news", {})

    assert time.monotonic() - began < 8


def _drip(handler: BaseHTTPRequestHandler, content: bytes) -> None:
    handler.wfile.write(content)
    handler.wfile.flush()
