"""Laws of uploads in parts: any order, any number of tries, any process; one dataset in the end, and nothing left behind."""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from app.blobs import BlobStore
from app.core.uploads import GRACE_H, sweep_uploads, take_part
from app.db.engine import Engine
from app.db.uploads import Part, delete_upload
from app.errors import UploadNotFound
from p2d.client import Client
from tests.app.conftest import Api, a_job, rows, serving
from tests.rig import wait_for
from workers.loop import Worker


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def begin(api: Api, content: bytes, **fields: Any) -> dict[str, Any]:
    """A new upload for this file, as POST /uploads answers."""
    answer = api.http.post("/uploads", json={"size_bytes": len(content), "name": "data.jsonl", **fields})
    assert answer.status_code == 201, answer.text
    upload: dict[str, Any] = answer.json()
    return upload


def part(upload: dict[str, Any], content: bytes, number: int) -> bytes:
    """What the upload says that the part holds."""
    start = (number - 1) * upload["part_bytes"]
    return content[start : start + upload["part_bytes"]]


def put(api: Api, upload: dict[str, Any], number: int, content: bytes, *, digest: str | None = None) -> httpx.Response:
    digest = digest or base64.b64encode(hashlib.sha256(content).digest()).decode()
    headers = {"Content-Digest": f"sha-256=:{digest}:", "Content-Type": "application/octet-stream"}
    return api.http.put(f"/uploads/{upload['id']}/parts/{number}", content=content, headers=headers)


def send(api: Api, upload: dict[str, Any], content: bytes, *numbers: int) -> None:
    """Send these parts, or all."""
    for number in numbers or range(1, upload["part_count"] + 1):
        answer = put(api, upload, number, part(upload, content, number))
        assert answer.status_code == 200, answer.text


def complete(api: Api, upload: dict[str, Any], **fields: Any) -> httpx.Response:
    return (
        api.http.post(f"/uploads/{upload['id']}/complete", json=fields)
        if fields
        else api.http.post(f"/uploads/{upload['id']}/complete")
    )


def look(api: Api, upload: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = api.http.get(f"/uploads/{upload['id']}").json()
    return found


def left(api: Api) -> set[str]:
    """Names of all parts in the store."""
    return {name for name in api.stored() if name.startswith("upl_")}


# --- from parts to a dataset -----------------------------------------------------------------------------------------


def test_parts_in_any_order_become_the_same_dataset_as_a_plain_upload(api: Api, seed: int) -> None:
    content = rows(100)
    upload = begin(api, content, sha256=sha256(content))
    order = list(range(1, upload["part_count"] + 1))
    random.Random(seed).shuffle(order)
    assert len(order) > 3

    send(api, upload, content, *order)
    there = look(api, upload)
    answer = complete(api, upload)

    assert [one["number"] for one in there["parts"]] == sorted(order)
    assert answer.status_code == 201, answer.text
    dataset = answer.json()
    assert (dataset["name"], dataset["rows"], dataset["size_bytes"]) == ("data.jsonl", 100, len(content))
    assert dataset["raw_sha256"] == sha256(content)
    assert answer.headers["Location"] == f"/datasets/{dataset['id']}"
    assert api.upload(content).json()["id"] == dataset["id"]
    done = look(api, upload)
    assert (done["status"], done["dataset_id"]) == ("completed", dataset["id"])
    assert api.uploading() == []


def test_parts_may_come_at_once_and_again(api: Api) -> None:
    content = rows(120, start=200)
    upload = begin(api, content)
    numbers = [*range(1, upload["part_count"] + 1)] * 3

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: put(api, upload, number, part(upload, content, number)), numbers))

    assert {answer.status_code for answer in answers} == {200}
    assert complete(api, upload).json()["rows"] == 120


def test_an_upload_goes_on_after_a_restart_of_the_service(api: Api) -> None:
    content = rows(80, start=400)
    with serving(api.settings) as before:
        upload = begin(before, content, sha256=sha256(content))
        send(before, upload, content, 3, 1)

    with serving(api.settings) as after:
        there = [one["number"] for one in look(after, upload)["parts"]]
        send(after, upload, content, *(set(range(1, upload["part_count"] + 1)) - set(there)))
        answer = complete(after, upload)

    assert there == [1, 3]
    assert answer.status_code == 201, answer.text
    assert answer.json()["rows"] == 80


def test_a_compressed_file_with_other_column_names_may_come_in_parts(api: Api) -> None:
    content = gzip.compress(rows(300, start=600).replace(b'"question"', b'"Frage"'))
    upload = begin(api, content)
    send(api, upload, content)

    wrong = complete(api, upload, mapping={"question": "Fragen"})
    right = complete(api, upload, mapping={"question": "Frage"})

    assert (wrong.status_code, wrong.json()["code"]) == (422, "dataset.mapping")
    assert (right.status_code, right.json()["rows"]) == (201, 300)


def test_completing_again_gives_the_same_dataset(api: Api) -> None:
    content = rows(90, start=1000)
    upload = begin(api, content)
    send(api, upload, content)
    before = api.count("datasets")

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: complete(api, upload), range(4)))
    answers.append(complete(api, upload))

    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 201]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert answers[-1].json()["received_sha256"] is None  # nothing was looked at again
    assert api.count("datasets") == before + 1


def test_with_a_key_a_repeat_gets_the_first_answer(api: Api) -> None:
    content, headers = rows(20, start=1200), {"Idempotency-Key": "begin"}
    body = {"size_bytes": len(content)}
    first = api.http.post("/uploads", json=body, headers=headers)
    again = api.http.post("/uploads", json=body, headers=headers)
    other = api.http.post("/uploads", json={"size_bytes": 5}, headers=headers)
    upload = first.json()
    send(api, upload, content)
    path, headers = f"/uploads/{upload['id']}/complete", {"Idempotency-Key": "complete"}
    done, repeated = (api.http.post(path, headers=headers) for _ in range(2))

    assert again.json() == upload
    assert (other.status_code, other.json()["code"]) == (422, "idempotency.mismatch")
    assert (done.status_code, repeated.status_code) == (201, 201)
    assert repeated.json() == done.json()
    assert repeated.headers["Idempotency-Replayed"] == "true"


def test_the_client_sends_a_large_file_in_parts(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2d.client.PARTS_FROM_BYTES", 1000)
    path, before = tmp_path / "german.jsonl", api.count("uploads")
    path.write_bytes(rows(70, start=3000).replace(b'"question"', b'"Frage"'))

    with Client(api.url) as client:
        dataset_id = client.upload(path, mapping={"question": "Frage"})

    assert api.http.get(f"/datasets/{dataset_id}").json()["name"] == "german.jsonl"
    assert api.count("uploads") == before + 1
    assert api.upload(rows(70, start=3000)).json()["id"] == dataset_id


# --- what is refused -------------------------------------------------------------------------------------------------


def test_missing_parts_are_listed(api: Api) -> None:
    content = rows(100, start=1400)
    upload = begin(api, content)
    send(api, upload, content, 2)

    answer = complete(api, upload)

    assert (answer.status_code, answer.json()["code"]) == (409, "upload.incomplete")
    missing = [number for number in range(1, upload["part_count"] + 1) if number != 2]
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [f"/parts/{number}" for number in missing]
    assert answer.json()["facts"]["missing"] == missing


def test_a_part_with_another_hash_or_size_is_refused_and_not_kept(api: Api) -> None:
    content = rows(60, start=1600)
    upload = begin(api, content)
    first, count = part(upload, content, 1), upload["part_count"]
    wrong = base64.b64encode(bytes(32)).decode()
    before = left(api)

    answers = [
        put(api, upload, 1, first, digest=wrong),
        put(api, upload, 1, first[:-1]),
        put(api, upload, 1, first + b"x" * 5_000_000),
        put(api, upload, count, first),
        put(api, upload, count + 1, first),
        put(api, upload, 1, first, digest="%%%"),
        put(api, upload, 0, first),
    ]

    assert [(answer.status_code, answer.json()["errors"][0]["code"]) for answer in answers] == [
        (422, "upload.part_hash"),
        (422, "upload.part_size"),
        (422, "upload.part_size"),
        (422, "upload.part_size"),
        (422, "upload.no_such_part"),
        (422, "field.content_digest"),
        (422, "field.greater_than_equal"),
    ]
    assert look(api, upload)["parts"] == []
    assert left(api) == before
    assert api.uploading() == []


def test_a_refused_file_can_be_mended_by_sending_a_part_again(api: Api) -> None:
    content = rows(60, start=1800)
    upload = begin(api, content, sha256=sha256(content))
    send(api, upload, content)
    bad = part(upload, content, 2).replace(b"answer", b"Answer")
    put(api, upload, 2, bad)

    refused = complete(api, upload)
    put(api, upload, 2, part(upload, content, 2))
    mended = complete(api, upload)

    assert (refused.status_code, refused.json()["code"]) == (422, "upload.hash_mismatch")
    assert mended.status_code == 201, mended.text


def test_bad_lines_are_listed_as_for_a_plain_upload(api: Api) -> None:
    lines = rows(60, start=2000).splitlines(keepends=True)
    lines[4], lines[50] = b"{}\n", b'{"question": "q", "answer": ""}\n'
    content = b"".join(lines)
    upload = begin(api, content)
    send(api, upload, content)

    answer = complete(api, upload)

    assert (answer.status_code, answer.json()["code"]) == (422, "dataset.invalid")
    assert answer.json()["errors"] == api.upload(content).json()["errors"]
    assert look(api, upload)["status"] == "open"
    assert api.uploading() == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"size_bytes": 3_000_001}, 413, "dataset.too_large"),
        ({"size_bytes": 0}, 422, "request.invalid"),
        ({"size_bytes": "5"}, 422, "request.invalid"),
        ({"size_bytes": 5, "sha256": "AB" * 32}, 422, "request.invalid"),
        ({"size_bytes": 5, "parts": 3}, 422, "request.invalid"),
        ([], 422, "request.invalid"),
    ],
)
def test_an_upload_that_cannot_work_is_refused_at_once(api: Api, body: object, status: int, code: str) -> None:
    answer = api.http.post("/uploads", json=body)

    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_only_json_begins_or_completes_an_upload(api: Api) -> None:
    upload = begin(api, b"x")
    for path in ("/uploads", f"/uploads/{upload['id']}/complete"):
        answer = api.http.post(path, files={"file": ("x", b"x")})
        assert (answer.status_code, answer.json()["code"]) == (415, "request.unsupported_media_type")


# --- the end ---------------------------------------------------------------------------------------------------------


def test_nothing_is_taken_in_while_the_disk_is_nearly_full(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, known = begin(api, rows(80)), api.dataset()
    whole = begin(api, content := rows(80, start=2100))
    send(api, whole, content)
    total, floor = 100 * 10**6, 2 * api.settings.max_upload_bytes
    assert floor < 0.1 * total  # of a large disk not a whole tenth

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=total, free=floor - 1))
    file, given = {"file": ("x", rows(9000))}, {"rows": [{"question": "a", "answer": "b"}]}
    for refused in (
        api.http.post("/datasets", files=file),
        api.http.post("/datasets", json=given),
        api.http.post("/uploads", json={"size_bytes": 10}),
        put(api, upload, 1, part(upload, rows(80), 1)),
        api.send(a_job(), rows(80)),
        api.post(a_job(dataset=given)),
        complete(api, whole),
    ):
        assert (refused.status_code, refused.json()["code"]) == (507, "service.disk_full")
        assert (refused.json()["retryable"], refused.headers["retry-after"]) == (True, "60")
    assert api.uploading() == []
    assert api.post(a_job(dataset=known)).status_code == 202  # takes no room here

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=total, free=floor))
    assert put(api, upload, 1, part(upload, rows(80), 1)).status_code == 200


def test_a_disk_that_fills_up_while_a_file_is_put_together_says_so(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = begin(api, content := rows(80, start=2100))
    send(api, upload, content)

    def full(*_: object) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "stream_part", full)
        refused = complete(api, upload)

    assert (refused.status_code, refused.json()["code"]) == (507, "service.disk_full")
    assert api.uploading() == []
    assert complete(api, upload).status_code == 201


def expire(api: Api, upload: dict[str, Any], *, hours_ago: float = 0) -> None:
    with api.engine.begin() as conn:
        conn.exec_driver_sql(
            "update uploads set expires_at = now() - %s * interval '1 hour' where id = %s", (hours_ago, upload["id"])
        )


def is_gone(api: Api, upload: dict[str, Any]) -> bool:
    path, content = f"/uploads/{upload['id']}", b"x" * upload["size_bytes"]
    answers = [
        api.http.get(path),
        api.http.delete(path),
        api.http.post(path + "/complete"),
        put(api, upload, 1, content),
    ]
    return {(answer.status_code, answer.json()["code"]) for answer in answers} == {(404, "upload.not_found")}


def test_a_deleted_upload_is_gone_at_once_and_its_parts_soon(api: Api) -> None:
    content = rows(50, start=2200)
    upload, other = begin(api, content), begin(api, content)
    send(api, upload, content)
    send(api, other, content)

    receipt = api.http.delete(f"/uploads/{upload['id']}").json()

    assert receipt["what"] == "upload"
    assert receipt["sha256"] == sorted({one["sha256"] for one in look(api, other)["parts"]})
    (entry,) = api.http.get("/audit", params={"object": upload["id"]}).json()["data"]
    assert (entry["id"], entry["action"]) == (receipt["audit_id"], "upload.delete")
    assert is_gone(api, upload)
    sweep_uploads(api.engine, api.blobs)

    assert not [name for name in left(api) if name.startswith(upload["id"])]
    assert complete(api, other).status_code == 201


def test_a_worker_removes_the_parts_of_uploads_that_are_complete_or_expired(api: Api) -> None:
    content = rows(50, start=2400)
    done, given_up = begin(api, content), begin(api, content)
    send(api, done, content)
    send(api, given_up, content, 1)
    dataset = complete(api, done).json()
    expire(api, given_up)
    assert is_gone(api, given_up)

    worker = Worker(api.settings)
    worker.start()
    wait_for(lambda: not {name for name in left(api) if name.startswith((done["id"], given_up["id"]))}, "the sweep")
    worker.stop()
    assert worker.join(30)

    assert look(api, done)["dataset_id"] == dataset["id"]
    assert api.http.get(f"/datasets/{dataset['id']}").json()["rows"] == 50
    assert put(api, done, 1, part(done, content, 1)).json()["code"] == "upload.completed"


def test_every_part_puts_the_end_off(api: Api) -> None:
    content = rows(50, start=2600)
    upload = begin(api, content)
    expire(api, upload, hours_ago=-1)

    send(api, upload, content, 1)

    assert look(api, upload)["expires_at"] > upload["expires_at"]


def test_old_uploads_leave_no_row(api: Api) -> None:
    content = rows(50, start=2800)
    upload = begin(api, content)
    send(api, upload, content, 1)
    expire(api, upload, hours_ago=GRACE_H + 1)
    before = api.count("uploads")

    sweep_uploads(api.engine, api.blobs)

    assert api.count("uploads") == before - 1
    assert not [name for name in left(api) if name.startswith(upload["id"])]


def test_a_part_that_arrives_after_the_end_leaves_nothing(api: Api, tmp_path: Path) -> None:
    upload, path = begin(api, b"x"), tmp_path / "part"
    path.write_bytes(b"x")
    late = Part(upload_id=upload["id"], number=1, sha256=sha256(b"x"))

    with pytest.raises(UploadNotFound):
        take_part(api.engine, Slow(api.settings.url("store_url"), api.engine), late, path, expiry_h=1)

    assert late.key not in api.stored()


class Slow(BlobStore):
    """A store in which the upload is deleted and swept while a part is on its way."""

    def __init__(self, url: str, engine: Engine) -> None:
        super().__init__(BlobStore.open(url)._store)
        self._engine = engine

    def put_part(self, name: str, path: Path) -> None:
        with self._engine.begin() as conn:
            assert delete_upload(conn, name.partition(".")[0])
        sweep_uploads(self._engine, self)
        super().put_part(name, path)
