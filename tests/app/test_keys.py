"""Laws of API keys: shown once, kept nowhere, refused the moment they should be; and of a service that has none."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from typer.testing import CliRunner

from app.access_errors import KeyRefused
from app.api.door import _refuse_strangers, is_loopback
from app.cli import cli
from app.core.keys import KEY_PATTERN, check_key, make_key, read_pepper
from app.db.audit import list_entries
from app.db.projects import DEFAULT_PROJECT, find_project
from app.errors import NoKeys, PepperMissing
from app.main import may_listen
from app.settings import Settings
from p2d.client import Client, ServiceProblem
from tests.app.conftest import Api, serving

ADMIN = "P2D_TEST_ADMIN"


@pytest.fixture(scope="module")
def keyless(module_settings: Settings) -> Iterator[Api]:
    """The service before anybody has made a key; the tests below make the first one, in the order they stand."""
    with serving(module_settings) as api:
        yield api


@pytest.fixture(scope="module")
def admin(keyless: Api) -> str:
    """The first key."""
    with keyless.engine.begin() as conn:
        return make_key(conn, keyless.settings, project_id=DEFAULT_PROJECT, scope="admin")[1]


def ask(api: Api, method: str, path: str, key: str | None, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return api.http.request(method, path, headers=headers, **more)


def a_request(client: str = "127.0.0.1", server: str = "127.0.0.1", **headers: str) -> Request:
    given = {"host": "127.0.0.1:8321", **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()]
    return Request({"type": "http", "client": (client, 5), "server": (server, 8321), "headers": raw})


# --- without keys ---------------------------------------------------------------------------------------------------------


def test_without_keys_this_machine_may_do_everything(keyless: Api) -> None:
    assert keyless.http.get("/keys").json()["data"] == []
    assert keyless.dataset().startswith("ds_")


@pytest.mark.parametrize(
    "request_",
    [
        a_request(client="192.0.2.7"),
        a_request(server="192.0.2.1"),
        a_request(client="::ffff:192.0.2.7", server="::1"),
        a_request(host="rebound.example"),
        a_request(host="127.0.0.1.example:8321"),
        a_request(sec_fetch_site="cross-site"),
        a_request(x_forwarded_for="127.0.0.1"),
        a_request(forwarded="for=192.0.2.7"),
    ],
)
def test_without_keys_strangers_are_refused(request_: Request) -> None:
    with pytest.raises(KeyRefused):
        _refuse_strangers(request_)


@pytest.mark.parametrize(
    "request_",
    [
        a_request(),
        a_request(client="::1", server="::1", host="[::1]:8321"),
        a_request(host="localhost", sec_fetch_site="same-origin"),
    ],
)
def test_without_keys_this_machine_is_not_refused(request_: Request) -> None:
    _refuse_strangers(request_)


def test_a_page_that_points_its_name_here_gets_nothing(keyless: Api) -> None:
    answer = keyless.http.get("/jobs", headers={"Host": "rebound.example"})

    assert (answer.status_code, answer.json()["code"]) == (401, "auth.key_refused")


def test_without_keys_it_refuses_to_listen_beyond_loopback(keyless: Api) -> None:
    may_listen(keyless.settings)
    for host in ("0.0.0.0", "::", "192.0.2.1", "p2d.example", ""):
        with pytest.raises(NoKeys):
            may_listen(keyless.settings.model_copy(update={"host": host}))
    assert is_loopback("localhost")
    assert is_loopback("::1")


# --- with the first key ---------------------------------------------------------------------------------------------------


def test_from_the_first_key_on_every_request_needs_one(keyless: Api, admin: str) -> None:
    assert keyless.http.get("/jobs").status_code == 401
    assert ask(keyless, "GET", "/datasets", admin).json()["data"]  # the default project's, from before
    may_listen(keyless.settings.model_copy(update={"host": "0.0.0.0"}))


def test_a_key_is_shown_once_and_kept_nowhere(keyless: Api, admin: str, capfd: pytest.CaptureFixture[str]) -> None:
    made = ask(keyless, "POST", "/keys", admin, json={"scope": "write", "name": "laptop", "expires_days": 1})
    assert made.status_code == 201
    text = made.json()["key"]
    assert KEY_PATTERN.fullmatch(text)

    # Every way in which a key may be said again: lists, errors, errors of our own with their traceback.
    said = [ask(keyless, "GET", "/keys", admin).text, ask(keyless, "GET", f"/jobs?limit={text}", text).text]
    with keyless.engine.begin() as conn:
        conn.exec_driver_sql("revoke select on jobs from p2d_api")
    said.append(ask(keyless, "GET", "/jobs", text).text)
    with keyless.engine.begin() as conn:
        conn.exec_driver_sql("grant select on jobs to p2d_api")
        dump = str(conn.exec_driver_sql("select to_jsonb(k)::text from api_keys k").all())
    secret = text.rpartition("_")[2]
    output = capfd.readouterr()
    for place in (*said, dump, output.out, output.err):
        assert secret not in place
    assert "internal.error" in said[-1]


def test_a_request_for_a_key_that_is_sent_again_makes_no_second_one_and_tells_no_secret(
    keyless: Api, admin: str
) -> None:
    def again(**body: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {admin}", "Idempotency-Key": "one-key"}
        return keyless.http.post("/keys", json=body, headers=headers)

    first, second = again(scope="read"), again(scope="read")

    assert (first.status_code, second.status_code) == (201, 201)
    assert KEY_PATTERN.fullmatch(first.json()["key"])
    assert second.headers["idempotency-replayed"] == "true"
    assert second.json() == {**first.json(), "key": None}
    assert again(scope="write").json()["code"] == "idempotency.mismatch"
    with keyless.engine.connect() as conn:
        kept = conn.exec_driver_sql("select string_agg(k::text, '') from idempotency_keys k").scalar_one()
    assert first.json()["key"] not in kept
    assert first.json()["id"] in kept


def test_a_revoked_key_is_refused_at_once_and_its_stream_ends(keyless: Api, admin: str) -> None:
    made = ask(keyless, "POST", "/keys", admin, json={"scope": "admin"}).json()
    with Client(keyless.url, api_key=made["key"]) as client:
        job_id = client.submit(
            {"kind": "identify_heads", "base_model": "stub", "heads": {"proxy_rows": 8}}, dataset=ds(keyless, admin)
        ).id
        headers = {"Authorization": f"Bearer {made['key']}", "Accept": "text/event-stream"}
        with keyless.http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as stream:
            lines = stream.iter_lines()
            assert next(line for line in lines if line.startswith("id:")) == "id: 1"
            revoked = ask(keyless, "DELETE", f"/keys/{made['id']}", admin)
            assert (revoked.status_code, revoked.json()["state"]) == (200, "revoked")
            assert not [line for line in lines if line.startswith("id:")]  # it ends: 15 s of silence are a ping here
        with pytest.raises(ServiceProblem) as problem:
            client.job(job_id)
    assert (problem.value.status, problem.value.code) == (401, "auth.key_refused")
    again = ask(keyless, "DELETE", f"/keys/{made['id']}", admin)
    assert again.json()["revoked_at"] == revoked.json()["revoked_at"]
    told = ask(keyless, "GET", f"/audit?object={made['id']}", admin).json()["data"]
    assert [entry["action"] for entry in told] == ["key.revoke", "key.revoke", "key.create"]
    assert told[0]["actor"].removeprefix("key_") == admin.split("_")[1]


def ds(api: Api, key: str) -> str:
    return str(ask(api, "GET", "/datasets", key).json()["data"][0]["id"])


def test_an_upload_with_a_bad_key_gets_its_answer_and_no_reset(keyless: Api, admin: str) -> None:
    answer = ask(keyless, "POST", "/datasets", admin[:-3] + "aaa", files={"file": ("big.jsonl", b"x" * 5_000_000)})

    assert answer.status_code == 401


def test_use_is_noted_to_the_minute(keyless: Api, admin: str) -> None:
    made = ask(keyless, "POST", "/keys", admin, json={"scope": "read"}).json()
    assert made["used_at"] is None

    ask(keyless, "GET", "/jobs", made["key"])
    seen = [one for one in ask(keyless, "GET", "/keys", admin).json()["data"] if one["id"] == made["id"]]
    ask(keyless, "GET", "/jobs", made["key"])
    again = [one for one in ask(keyless, "GET", "/keys", admin).json()["data"] if one["id"] == made["id"]]

    assert seen[0]["used_at"] is not None
    assert again == seen


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/scope"),
        ({"scope": "root"}, "/scope"),
        ({"scope": "read", "expires_days": 0}, "/expires_days"),
        ({"scope": "read", "project": "other"}, "/project"),
    ],
)
def test_a_wrong_request_for_a_key_is_refused(keyless: Api, admin: str, body: dict[str, Any], pointer: str) -> None:
    answer = ask(keyless, "POST", "/keys", admin, json=body)

    assert answer.status_code == 422
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]


# --- the pepper -----------------------------------------------------------------------------------------------------------


def test_the_pepper_is_a_file_for_its_owner_alone_and_without_it_no_key_opens(
    keyless: Api, admin: str, tmp_path: Path
) -> None:
    path = keyless.settings.home / "key-pepper"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    elsewhere = keyless.settings.model_copy(update={"home": tmp_path})
    with keyless.engine.begin() as conn:
        assert check_key(conn, read_pepper(keyless.settings), admin).scope == "admin"
        for pepper in (read_pepper(elsewhere), b"another"):
            with pytest.raises(KeyRefused):
                check_key(conn, pepper, admin)
        with pytest.raises(PepperMissing):
            make_key(conn, elsewhere, project_id=DEFAULT_PROJECT, scope="read")
    assert list(tmp_path.iterdir()) == []


# --- the command line -----------------------------------------------------------------------------------------------------


def test_the_command_line_makes_lists_and_revokes_keys(
    keyless: Api, admin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2D_DATABASE_URL", keyless.settings.url("database_url"))
    monkeypatch.setenv("P2D_HOME", str(keyless.settings.home))
    run = CliRunner()

    made = run.invoke(
        cli, ["keys", "create", "--project", "lab", "--scope", "write", "--expires", "30", "--name", "ci"]
    )
    assert made.exit_code == 0, made.output
    text = made.stdout.strip()
    key_id = "key_" + text.split("_")[1]
    monkeypatch.setenv("P2D_API_KEY", text)
    with Client(keyless.url) as client:
        assert list(client.jobs()) == []  # another project's
    shown = run.invoke(cli, ["keys", "list"]).stdout
    assert all(word in shown for word in (key_id, "lab", "write", "active", "ci"))
    assert text.rpartition("_")[2] not in shown

    assert run.invoke(cli, ["keys", "revoke", key_id]).exit_code == 0
    with keyless.engine.connect() as conn:
        noted = list_entries(conn, limit=2, object_id=key_id)
        lab = find_project(conn, "lab")
    assert [(entry.action, entry.actor, entry.project_id) for entry in noted] == [
        ("key.revoke", "command line", lab),
        ("key.create", "command line", lab),
    ]
    assert text.rpartition("_")[2] not in str(noted)
    assert ask(keyless, "GET", "/jobs", text).status_code == 401
