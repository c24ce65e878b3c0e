"""Laws of signed URLs: one does one thing, for minutes, with a real S3 server; without one the service says so and streams."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
import obstore
import pytest
from obstore.store import S3Store
from pydantic import SecretStr

from app.core.keys import make_key
from app.db.projects import DEFAULT_PROJECT
from app.presign import Signer, signer_of
from app.settings import Settings
from p2d.client import Client
from tests.app.conftest import Api, rows, serving
from tests.s3_server import KEYS


@pytest.fixture(scope="module")
def s3(module_settings: Settings, s3_url: str) -> Iterator[Api]:
    """A service over an S3 store that hands out URLs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        changed = {"store_url": SecretStr(s3_url), "presign": True, "upload_part_bytes": 1000}
        with serving(module_settings.model_copy(update=changed)) as api:
            yield api


@pytest.fixture(scope="module")
def artifact(s3: Api) -> dict[str, Any]:
    """A file of a finished job."""
    job_id = s3.job()
    s3.finish(job_id)
    files: list[dict[str, Any]] = s3.http.get(f"/jobs/{job_id}/artifacts").json()["data"]
    return next(file for file in files if file["name"] == "heads.safetensors")


def begin(api: Api, content: bytes) -> dict[str, Any]:
    upload: dict[str, Any] = api.http.post("/uploads", json={"size_bytes": len(content), "name": "data.jsonl"}).json()
    return upload


def parts(upload: dict[str, Any], content: bytes) -> dict[int, bytes]:
    size = upload["part_bytes"]
    return {n + 1: content[n * size : (n + 1) * size] for n in range(upload["part_count"])}


def said(part: bytes) -> dict[str, Any]:
    return {"size_bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()}


def ask(api: Api, upload: dict[str, Any], number: int, part: bytes) -> httpx.Response:
    return api.http.post(f"/uploads/{upload['id']}/parts/{number}/url", json=said(part))


def put(signed: dict[str, Any], content: bytes, *, method: str = "PUT", **headers: str) -> httpx.Response:
    """Use a URL as any HTTP client does; its own Content-Length is what the store sees."""
    sent = {name: value for name, value in signed["headers"].items() if name != "content-length"}
    with httpx.Client(trust_env=False) as http:
        return http.request(method, signed["url"], content=content, headers={**sent, **headers})


def register(api: Api, upload: dict[str, Any], number: int, part: bytes) -> httpx.Response:
    return api.http.post(f"/uploads/{upload['id']}/parts/{number}", json={"sha256": said(part)["sha256"]})


# --- parts -----------------------------------------------------------------------------------------------------------


def test_parts_go_to_the_store_directly_and_become_the_same_dataset(s3: Api) -> None:
    content = rows(60)
    upload = begin(s3, content)

    for number, part in parts(upload, content).items():
        signed = ask(s3, upload, number, part)
        assert signed.status_code == 200, signed.text
        assert put(signed.json(), part).status_code == 200
        for _ in range(2):
            assert register(s3, upload, number, part).json() == {"number": number, "sha256": said(part)["sha256"]}
    done = s3.http.post(f"/uploads/{upload['id']}/complete")

    assert upload["part_count"] > 2
    assert (done.status_code, done.json()["rows"]) == (201, 60)
    assert s3.upload(content).json()["id"] == done.json()["id"]


def test_a_url_is_for_one_key_one_verb_one_size_and_one_time(s3: Api) -> None:
    upload = begin(s3, content := rows(40))
    part = parts(upload, content)[1]
    signed = ask(s3, upload, 1, part).json()
    url = signed["url"]
    digest = said(part)["sha256"]
    other_key = {**signed, "url": url.replace(f".1.{digest}", f".2.{digest}")}
    longer = {**signed, "url": url.replace("X-Amz-Expires=900", "X-Amz-Expires=90000")}
    assert url != other_key["url"] != longer["url"]

    refused = {
        "another key": put(other_key, part),
        "another life": put(longer, part),
        "another verb": put(signed, b"", method="DELETE"),
        "reading": put(signed, b"", method="GET"),
        "a longer body": put(signed, part + b"x"),
        "a shorter body": put(signed, part[:-1]),
        "another sha256": put(signed, part, **{"x-amz-checksum-sha256": "A" * 43 + "="}),
        "no sha256": put({**signed, "headers": {}}, part),
    }

    assert {what: answer.status_code for what, answer in refused.items()} == dict.fromkeys(refused, 403)
    assert register(s3, upload, 1, part).json()["errors"][0]["code"] == "upload.part_not_there"
    assert put(signed, part).status_code == 200


def test_a_url_is_over_when_its_time_is(s3: Api) -> None:
    endpoint = _endpoint(s3.settings.url("store_url"))
    signer = signer_of("p2d", endpoint=endpoint, region="us-east-1", prefix="x")
    assert signer is not None
    moments = {"now": datetime.now(UTC), "long ago": datetime.now(UTC) - timedelta(seconds=901)}

    answers = {}
    for moment, now in moments.items():
        signed = signer.sign("PUT", "some key", lives_s=900, headers={"content-length": "1"}, now=now)
        answers[moment] = put({"url": signed.url, "headers": signed.headers}, b"x").status_code

    assert answers == {"now": 200, "long ago": 403}


def test_a_part_of_other_bytes_is_found_by_the_store_and_at_the_latest_in_the_end(s3: Api, s3_url: str) -> None:
    upload = begin(s3, content := rows(40, start=100))
    whole = parts(upload, content)
    other = {number: bytes(len(part)) for number, part in whole.items()}
    for number, part in whole.items():
        signed = ask(s3, upload, number, part).json()
        assert put(signed, other[number]).status_code == 400  # this store compares the sha256
        # One that does not is played by writing past it.
        store = S3Store("p2d", endpoint=_endpoint(s3_url), client_options={"allow_http": True})
        obstore.put(store, urlsplit(signed["url"]).path.removeprefix("/p2d/"), other[number])
    for number, part in whole.items():
        assert register(s3, upload, number, part).status_code == 200

    refused = s3.http.post(f"/uploads/{upload['id']}/complete")

    assert (refused.status_code, refused.json()["code"]) == (422, "upload.part_wrong")
    assert refused.json()["errors_total"] == len(whole)
    for number, part in whole.items():
        put(ask(s3, upload, number, part).json(), part)
    assert s3.http.post(f"/uploads/{upload['id']}/complete").status_code == 201


def test_a_url_is_given_for_a_part_that_the_upload_has(s3: Api) -> None:
    upload = begin(s3, content := rows(40, start=200))
    part, count = parts(upload, content)[1], upload["part_count"]

    faults = {
        "another size": ask(s3, upload, 1, part[:-1]),
        "no such part": ask(s3, upload, count + 1, part),
        "no such upload": ask(s3, {"id": "upl_" + 26 * "0"}, 1, part),
        "no sha256": s3.http.post(f"/uploads/{upload['id']}/parts/1/url", json={"size_bytes": 1000}),
        "never put": register(s3, upload, 1, part),
    }

    found = {what: (answer.status_code, answer.json()["code"]) for what, answer in faults.items()}
    assert found == {
        "another size": (422, "upload.part_wrong"),
        "no such part": (422, "upload.part_wrong"),
        "no such upload": (404, "upload.not_found"),
        "no sha256": (422, "request.invalid"),
        "never put": (422, "upload.part_wrong"),
    }


def test_urls_are_given_for_few_contents_of_one_part_and_only_the_last_registered_stays(s3: Api) -> None:
    upload = begin(s3, content := rows(10, start=250))
    contents = [bytes([number]) * len(content) for number in range(12)]

    signed = [ask(s3, upload, 1, one) for one in contents]
    for number in (0, 1):
        put(signed[number].json(), contents[number])
        assert register(s3, upload, 1, contents[number]).status_code == 200

    assert [answer.status_code for answer in signed] == [200] * 10 + [409] * 2
    assert signed[-1].json()["code"] == "upload.too_many_versions"
    assert register(s3, upload, 1, contents[0]).json()["errors"][0]["code"] == "upload.part_not_there"
    there = s3.http.get(f"/uploads/{upload['id']}").json()["parts"]
    assert there == [{"number": 1, "sha256": said(contents[1])["sha256"]}]


@pytest.mark.parametrize("presign", [False, True])
def test_without_an_s3_store_or_the_setting_no_url_is_given(module_settings: Settings, presign: bool) -> None:
    with serving(module_settings.model_copy(update={"presign": presign})) as api:
        upload = begin(api, content := rows(40, start=300))
        answer = ask(api, upload, 1, parts(upload, content)[1])

    assert (answer.status_code, answer.json()["code"]) == (409, "store.no_signed_urls")
    assert "P2D_PRESIGN" in answer.json()["hint"]


# --- downloads -------------------------------------------------------------------------------------------------------


def test_a_download_is_sent_on_to_the_store_for_five_minutes(s3: Api, artifact: dict[str, Any]) -> None:
    answer = s3.http.get(f"/artifacts/{artifact['id']}/content")

    assert (answer.status_code, answer.headers["cache-control"], answer.content) == (307, "no-store", b"")
    place = answer.headers["location"]
    assert "X-Amz-Expires=300" in place
    with httpx.Client(trust_env=False) as http:
        whole = http.get(place)
        some = http.get(place, headers={"Range": "bytes=2-5"})
        changed = http.get(place.replace("response-content-type=application", "response-content-type=text"))
        other = http.get(place.replace(artifact["sha256"], 64 * "0"))
        verb = http.delete(place)
    assert hashlib.sha256(whole.content).hexdigest() == artifact["sha256"]
    assert whole.headers["content-type"] == artifact["media_type"]
    assert whole.headers["content-disposition"] == 'attachment; filename="heads.safetensors"'
    assert whole.headers["cache-control"] == "private, no-store"
    assert (some.status_code, some.content) == (206, whole.content[2:6])
    assert [changed.status_code, other.status_code, verb.status_code] == [403, 403, 403]


def test_what_needs_no_bytes_is_answered_here(s3: Api, artifact: dict[str, Any]) -> None:
    path = f"/artifacts/{artifact['id']}/content"

    assert s3.http.get(path, headers={"If-None-Match": f'"{artifact["sha256"]}"'}).status_code == 304
    assert s3.http.head(path).headers["content-length"] == str(artifact["size_bytes"])
    assert s3.http.get(path, headers={"Range": "bytes=99999999-"}).status_code == 416
    assert s3.http.get("/artifacts/art_" + 26 * "0" + "/content").status_code == 404


def test_the_client_follows_and_takes_its_key_nowhere_else(s3: Api, artifact: dict[str, Any], tmp_path: Any) -> None:
    sent: list[httpx.Request] = []

    class Seen(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            sent.append(request)
            return super().handle_request(request)

    with s3.engine.begin() as conn:
        key_row, text = make_key(conn, s3.settings, project_id=DEFAULT_PROJECT, scope="read")
    try:
        with Client(s3.url, api_key=text, transport=Seen()) as client:
            [path] = client.download(artifact["job_id"], tmp_path, names=["heads.safetensors"])
    finally:
        with s3.engine.begin() as conn:
            conn.exec_driver_sql("delete from api_keys where id = %s", (key_row.id,))

    assert hashlib.sha256(path.read_bytes()).hexdigest() == artifact["sha256"]
    assert [("authorization" in one.headers) for one in sent if "X-Amz-Signature" in str(one.url)] == [False]


def test_a_signature_is_in_the_answer_and_nowhere_else(
    s3: Api, artifact: dict[str, Any], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="app")
    upload = begin(s3, content := rows(40, start=400))
    headers = {"Idempotency-Key": "a-url"}
    path, part = f"/uploads/{upload['id']}/parts/1/url", said(parts(upload, content)[1])

    url = s3.http.post(path, json=part, headers=headers).json()["url"]
    s3.http.post(path, json=part, headers=headers)
    s3.http.get(f"/artifacts/{artifact['id']}/content")

    noted = s3.http.get("/audit", params={"object": artifact["id"]}).json()["data"][0]
    assert (noted["action"], noted["facts"]["by"]) == ("artifact.download", "signed URL")
    with s3.engine.connect() as conn:
        kept = [
            str(row)
            for table in ("idempotency_keys", "audit", "uploads", "upload_parts")
            for row in conn.exec_driver_sql(f"select to_jsonb(t)::text from {table} t")
        ]
    told, ours = capfd.readouterr(), [one for one in caplog.records if one.name.startswith("app")]
    everywhere = "".join([*kept, told.out, told.err, *(one.getMessage() for one in ours)])
    assert url.rpartition("X-Amz-Signature=")[2] not in everywhere
    assert "X-Amz" not in everywhere


# --- signing ---------------------------------------------------------------------------------------------------------


def test_a_url_is_amazons_published_example() -> None:
    signer = Signer(
        base="https://examplebucket.s3.amazonaws.com",
        region="us-east-1",
        access_key="AKIAIOSFODNN7EXAMPLE",
        secret_key="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    )

    signed = signer.sign("GET", "test.txt", lives_s=86400, now=datetime(2013, 5, 24, tzinfo=UTC))

    assert signed.url.endswith("&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404")
    assert "wJalr" not in repr(signer)
    assert "Signature" not in repr(signed)


def test_a_machine_without_keys_in_its_environment_signs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)

    assert signer_of("p2d", endpoint="", region="eu-west-1", prefix="") is None


def _endpoint(s3_url: str) -> str:
    return urlsplit(s3_url).query.partition("=")[2].partition("&")[0]
