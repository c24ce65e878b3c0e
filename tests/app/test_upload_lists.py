"""Laws of finding an upload again: it is listed while it lives, found by its file's hash, and goes on where it broke off."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import cli
from p2d.client import Client, ServiceProblem
from p2d.service_connection import ServiceConnection
from tests.app.conftest import Api, rows
from tests.app.test_uploads import begin, complete, look, send, sha256


@pytest.fixture
def sent(api: Api, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hashes of the parts that clients sent while the test ran; files above 1000 bytes go in parts."""
    monkeypatch.setattr("p2d.client.PARTS_FROM_BYTES", 1000)
    hashes: list[str] = []
    json = ServiceConnection.json

    def noting(self: object, method: str, path: str, **request: object) -> object:
        if method == "PUT":
            hashes.append(hashlib.sha256(request["content"]).hexdigest())  # type: ignore[arg-type]  # bytes
        return json(self, method, path, **request)  # type: ignore[arg-type]  # a ServiceConnection

    monkeypatch.setattr(ServiceConnection, "json", noting)
    return hashes


def listed(api: Api, **asked: str) -> list[str]:
    return [one["id"] for one in api.http.get("/uploads", params={"limit": 100, **asked}).json()["data"]]


def test_uploads_are_listed_newest_first_page_by_page_with_how_far_they_are(api: Api) -> None:
    content = rows(90, start=20_000)
    made = [begin(api, content, name=f"file {n}") for n in range(3)]
    send(api, made[1], content, 2, 3)
    send(api, made[1], content[:-1] + b" ", 3)  # again, with other bytes: still one part

    first = api.http.get("/uploads", params={"limit": 2}).json()
    begin(api, content)  # a new one does not shift the pages
    second = api.http.get("/uploads", params={"limit": 1, "cursor": first["next_cursor"]}).json()

    entries = [*first["data"], *second["data"]]
    assert [one["id"] for one in entries] == [upload["id"] for upload in reversed(made)]
    assert [one["parts_there"] for one in entries] == [0, 2, 0]
    whole = look(api, made[1])
    assert entries[1] == {name: value for name, value in whole.items() if name != "parts"}
    assert whole["parts_there"] == len(whole["parts"]) == 2


def test_what_is_complete_deleted_or_expired_is_not_open(api: Api) -> None:
    content = rows(60, start=21_000)
    digest = sha256(content)
    ready, deleted, expired, open = (begin(api, content, sha256=digest) for _ in range(4))
    send(api, ready, content)
    assert complete(api, ready).status_code == 201
    api.http.delete(f"/uploads/{deleted['id']}")
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update uploads set expires_at = now() where id = %s", (expired["id"],))

    assert listed(api, sha256=digest) == [open["id"], ready["id"]]
    assert listed(api, sha256=digest, status="open") == [open["id"]]
    assert listed(api, sha256=digest, status="completed") == [ready["id"]]
    assert listed(api, sha256="0" * 64) == []


@pytest.mark.parametrize(
    ("name", "value"), [("status", "broken"), ("sha256", "A" * 64), ("cursor", "x"), ("limit", "0")]
)
def test_a_filter_that_says_nothing_is_refused(api: Api, name: str, value: str) -> None:
    answer = api.http.get("/uploads", params={name: value})

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, f"/query/{name}")


def test_a_client_goes_on_with_what_is_there(api: Api, tmp_path: Path, sent: list[str]) -> None:
    path, content = tmp_path / "data.jsonl", rows(80, start=22_000)
    path.write_bytes(content)
    upload = begin(api, content, sha256=sha256(content))
    send(api, upload, content, 1, 3)
    there = {part["sha256"] for part in look(api, upload)["parts"]}
    before = api.count("uploads")

    with Client(api.url) as client:
        dataset_id = client.resume_upload(path)

    assert look(api, upload)["dataset_id"] == dataset_id
    assert api.count("uploads") == before
    assert len(sent) == upload["part_count"] - 2
    assert not there & set(sent)


def test_a_file_that_was_refused_for_its_mapping_is_not_sent_again(api: Api, tmp_path: Path, sent: list[str]) -> None:
    path = tmp_path / "german.jsonl"
    path.write_bytes(rows(80, start=23_000).replace(b'"question"', b'"Frage"'))

    with Client(api.url) as client:
        with pytest.raises(ServiceProblem):
            client.upload(path)
        parts = len(sent)
        assert client.resume_upload(path, mapping={"question": "Frage"}).startswith("ds_")

    assert len(sent) == parts > 1


def test_where_nothing_was_begun_all_is_sent(api: Api, tmp_path: Path, sent: list[str]) -> None:
    path = tmp_path / "new.jsonl"
    path.write_bytes(rows(80, start=24_000))

    with Client(api.url) as client:
        dataset_id = client.resume_upload(path)

    assert api.http.get(f"/datasets/{dataset_id}").json()["name"] == "new.jsonl"
    assert len(sent) > 1


def test_the_command_line_lists_uploads_and_goes_on(api: Api, tmp_path: Path, sent: list[str]) -> None:
    path, content = tmp_path / "typed.jsonl", rows(80, start=25_000)
    path.write_bytes(content)
    upload = begin(api, content, name="typed.jsonl", sha256=sha256(content))
    send(api, upload, content, 1)

    shown = CliRunner().invoke(cli, ["uploads", "--status", "open", "--url", api.url])
    done = CliRunner().invoke(cli, ["upload", str(path), "--resume", "--url", api.url])

    line = next(line for line in shown.stdout.splitlines() if upload["id"] in line)
    assert all(word in line for word in ("typed.jsonl", "open", f"1 of {upload['part_count']}"))
    assert (done.exit_code, done.stdout.split()[-1]) == (0, look(api, upload)["dataset_id"])
    assert len(sent) == upload["part_count"] - 1
