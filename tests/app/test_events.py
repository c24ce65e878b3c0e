"""Laws of the event log over HTTP: every number once and in order, whatever breaks; nobody waits on a connection."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import httpx

from app.core.moves import request_cancel, request_retry
from app.db.events import EventType, append_event
from app.views import EVENTS
from p2d.client import Client
from tests.app.conftest import Api, serving

STREAM = {"Accept": "text/event-stream"}


def add_events(api: Api, job_id: str, count: int) -> None:
    for number in range(count):
        with api.engine.begin() as conn:
            append_event(conn, job_id, "metric", {"step": "train", "done": number, "text": "line\nbreak é"})


def cancel(api: Api, job_id: str) -> None:
    with api.engine.begin() as conn:
        request_cancel(conn, job_id)


def frames(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream."""
    frame: dict[str, Any] = {}
    for line in answer.iter_lines():
        name, _, value = line.partition(": ")
        if line == "" and "data" in frame:
            yield frame
            frame = {}
        elif name in ("id", "event", "data"):
            frame[name] = json.loads(value) if name == "data" else value


def read_stream(api: Api, job_id: str, after: int = 0, stop: int | None = None) -> list[int]:
    """Numbers of a stream's events, up to its end or to `stop` of them."""
    headers = STREAM | ({"Last-Event-ID": str(after)} if after else {})
    seen: list[int] = []
    with api.http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        for frame in frames(answer):
            seen.append(int(frame["id"]))
            if len(seen) == stop:
                break
    return seen


def test_the_description_says_what_each_type_of_event_holds(api: Api) -> None:
    schema = api.http.get("/openapi.json").json()["components"]["schemas"]["EventView"]["properties"]["type"]

    assert {*EVENTS} == {*get_args(EventType)}
    assert all(f"* `{type}`: " in schema["description"] for type in EVENTS)


def test_a_page_holds_what_comes_after_a_number(api: Api) -> None:
    job_id = api.job()
    add_events(api, job_id, 5)

    page = api.http.get(f"/jobs/{job_id}/events", params={"after": 2, "limit": 3}).json()

    assert [event["seq"] for event in page["data"]] == [3, 4, 5]
    assert page["has_more"]
    rest = api.http.get(f"/jobs/{job_id}/events", params={"cursor": page["next_cursor"]}).json()
    assert [event["seq"] for event in rest["data"]] == [6]
    assert (rest["has_more"], rest["next_cursor"]) == (False, None)
    assert rest["data"][0]["data"] == {"step": "train", "done": 4, "text": "line\nbreak é"}


def test_a_long_poll_answers_as_soon_as_something_happens(api: Api) -> None:
    job_id = api.job()
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        waiting = pool.submit(api.http.get, f"/jobs/{job_id}/events", params={"after": 1, "wait": 20})
        add_events(api, job_id, 1)
        page = waiting.result().json()

    assert [event["seq"] for event in page["data"]] == [2]
    assert time.monotonic() - started < 10


def test_a_long_poll_of_an_ended_job_does_not_wait(api: Api) -> None:
    job_id = api.job()
    cancel(api, job_id)
    last = api.http.get(f"/jobs/{job_id}/events").json()["data"][-1]
    started = time.monotonic()

    page = api.http.get(f"/jobs/{job_id}/events", params={"after": last["seq"], "wait": 20}).json()

    assert (last["type"], page["data"]) == ("end", [])
    assert time.monotonic() - started < 5


def test_a_stream_tells_everything_in_order_and_ends_with_end(api: Api) -> None:
    job_id = api.job()
    add_events(api, job_id, 300)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_stream, api, job_id)
        add_events(api, job_id, 50)
        cancel(api, job_id)
        seen = reading.result(30)

    assert seen == list(range(1, len(seen) + 1))
    last = api.http.get(f"/jobs/{job_id}/events", params={"after": len(seen) - 1}).json()["data"]
    assert [(event["seq"], event["type"]) for event in last] == [(len(seen), "end")]


def test_a_stream_cut_at_random_places_misses_and_repeats_nothing(api: Api, seed: int) -> None:
    chance, job_id, seen = random.Random(seed), api.job(), list[int]()

    def write() -> None:
        add_events(api, job_id, 150)
        cancel(api, job_id)

    writing = threading.Thread(target=write)
    writing.start()
    while True:
        part = read_stream(api, job_id, after=seen[-1] if seen else 0, stop=chance.randint(1, 40))
        seen += part
        if api.http.get(f"/jobs/{job_id}/events", params={"after": seen[-1] - 1}).json()["data"][0]["type"] == "end":
            break
    writing.join()

    assert seen == list(range(1, len(seen) + 1))


def test_a_stream_that_has_ended_says_not_to_come_back(api: Api) -> None:
    job_id = api.job()
    cancel(api, job_id)
    last = api.http.get(f"/jobs/{job_id}/events").json()["data"][-1]["seq"]

    answer = api.http.get(f"/jobs/{job_id}/events", headers={**STREAM, "Last-Event-ID": str(last)})

    assert answer.status_code == 204


def test_a_stream_goes_on_over_the_end_of_a_job_that_was_retried(api: Api) -> None:
    job_id = api.job()
    cancel(api, job_id)
    with api.engine.begin() as conn:
        request_retry(conn, job_id)
    add_events(api, job_id, 3)

    with ThreadPoolExecutor(2) as pool, Client(api.url) as client:
        reading, following = pool.submit(read_stream, api, job_id), pool.submit(lambda: list(client.events(job_id)))
        add_events(api, job_id, 3)
        cancel(api, job_id)
        seen, followed = reading.result(30), following.result(30)

    assert seen == [event.seq for event in followed] == list(range(1, len(seen) + 1))
    ends = [event.seq for event in followed if event.type == "end"]
    assert (len(ends), ends[-1]) == (2, seen[-1])


def test_a_number_from_the_future_does_not_skip_what_comes(api: Api) -> None:
    job_id = api.job()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_stream, api, job_id, after=900, stop=1)
        while not reading.done():
            add_events(api, job_id, 1)

    assert reading.result()[0] >= 2


def test_a_silent_stream_is_kept_open_by_comments(api: Api) -> None:
    job_id, lines = api.job(), list[str]()

    with api.http.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if line == ": ping":
                break

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"


def test_a_number_that_is_none_is_refused(api: Api) -> None:
    job_id = api.job()
    for number in ("x", "-1", "9" * 20, "1.5"):
        answer = api.http.get(f"/jobs/{job_id}/events", headers={**STREAM, "Last-Event-ID": number})
        assert answer.status_code == 422, number
    assert api.http.get(f"/jobs/{job_id}/events", params={"after": "x"}).status_code == 422
    assert api.http.get(f"/jobs/{job_id}/events", params={"wait": "nan"}).status_code == 422


def test_open_streams_hold_no_database_connection(api: Api) -> None:
    settings = api.settings.model_copy(update={"db_pool_size": 1, "db_pool_wait_s": 10.0})
    job_id = api.job()
    with serving(settings) as small, ThreadPoolExecutor(40) as pool:
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=small.url, timeout=30, limits=limits, trust_env=False) as many:

            def read() -> int:
                with many.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as answer:
                    return sum(1 for _ in frames(answer))

            reading = [pool.submit(read) for _ in range(40)]
            for _ in range(5):
                assert small.http.get("/jobs").status_code == 200
            add_events(api, job_id, 3)
            cancel(api, job_id)
            counts = {future.result(30) for future in reading}

    assert len(counts) == 1


def test_too_many_streams_are_told_so(api: Api) -> None:
    job_id = api.job()
    with (
        serving(api.settings.model_copy(update={"max_streams": 1})) as small,
        small.http.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as first,
    ):
        lines = first.iter_lines()  # kept: a stream whose reader is gone is closed
        next(lines)
        answer = small.http.get(f"/jobs/{job_id}/events", headers=STREAM)

        assert (answer.status_code, answer.json()["code"]) == (503, "service.too_many_streams")
        assert answer.headers["Retry-After"] == "30"
