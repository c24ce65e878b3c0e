"""Laws of results over HTTP: bytes that match their hash, in any range; head maps and selections as they were made."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.app.conftest import Api, a_job, mark_of


@pytest.fixture(scope="module")
def job(api: Api) -> dict[str, Any]:
    """A job that ran to its end with the stub engine."""
    job_id = api.job()
    api.finish(job_id)
    job = api.http.get(f"/jobs/{job_id}").json()
    assert job["status"] == "succeeded", job["error"]
    return dict(job)


@pytest.fixture(scope="module")
def files(api: Api, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The job's files by name."""
    return {entry["name"]: entry for entry in api.http.get(f"/jobs/{job['id']}/artifacts").json()["data"]}


def test_every_file_arrives_with_its_hash(api: Api, files: dict[str, dict[str, Any]]) -> None:
    assert {"heads.safetensors", "manifest.json", "head_map.json", "selection.jsonl", "report.json"} <= set(files)
    for name, file in files.items():
        answer = api.http.get(f"/artifacts/{file['id']}/content")
        sha256 = hashlib.sha256(answer.content).hexdigest()
        assert (sha256, len(answer.content)) == (file["sha256"], file["size_bytes"])
        assert answer.headers["etag"] == f'"{sha256}"'
        assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"
        assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
        assert api.http.get(f"/artifacts/{file['id']}").json() == file


def test_a_range_is_the_same_bytes(api: Api, files: dict[str, dict[str, Any]], seed: int) -> None:
    file, chance = files["heads.safetensors"], random.Random(seed)
    path, size = f"/artifacts/{file['id']}/content", file["size_bytes"]
    whole = api.http.get(path).content
    cases = [(f"bytes={size - 1}-", size - 1, size), ("bytes=0-0", 0, 1), (f"bytes=0-{size * 2}", 0, size)]
    cases += [("bytes=-5", size - 5, size), (f"bytes=-{size * 2}", 0, size)]
    for _ in range(10):
        start, end = sorted(chance.sample(range(size), 2))
        cases.append((f"bytes={start}-{end - 1}", start, end))

    for header, start, end in cases:
        answer = api.http.get(path, headers={"Range": header})
        assert (answer.status_code, answer.content) == (206, whole[start:end]), header
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert answer.headers["content-length"] == str(end - start)


def test_a_range_behind_the_end_is_416(api: Api, files: dict[str, dict[str, Any]]) -> None:
    file = files["report.json"]
    for header in (f"bytes={file['size_bytes']}-", "bytes=-0", "bytes=99999999-"):
        answer = api.http.get(f"/artifacts/{file['id']}/content", headers={"Range": header})
        assert (answer.status_code, answer.json()["code"]) == (416, "request.range")
        assert answer.headers["content-range"] == f"bytes */{file['size_bytes']}"


@pytest.mark.parametrize("header", ["bytes=0-1,4-5", "bytes=5-2", "rows=0-1", "bytes=-", "bytes=a-b", "bytes", ""])
def test_a_range_that_is_not_understood_gets_the_whole(api: Api, files: dict[str, dict[str, Any]], header: str) -> None:
    file = files["report.json"]
    answer = api.http.get(f"/artifacts/{file['id']}/content", headers={"Range": header})
    assert (answer.status_code, len(answer.content)) == (200, file["size_bytes"])


def test_conditions_follow_the_hash(api: Api, files: dict[str, dict[str, Any]]) -> None:
    file = files["report.json"]
    path, etag, other = f"/artifacts/{file['id']}/content", f'"{file["sha256"]}"', f'"{"0" * 64}"'

    def status(**headers: str) -> int:
        return api.http.get(
            path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        ).status_code

    assert status(If_None_Match=etag) == 304
    assert status(If_None_Match=f"{other}, W/{etag}") == 304
    assert status(If_None_Match="*", Range="bytes=0-1") == 304
    assert status(If_None_Match=other) == 200
    assert status(If_Range=etag, Range="bytes=0-1") == 206
    assert status(If_Range=other, Range="bytes=0-1") == 200


def test_head_answers_like_get_without_the_bytes(api: Api, files: dict[str, dict[str, Any]]) -> None:
    path = f"/artifacts/{files['report.json']['id']}/content"
    head, get = api.http.head(path), api.http.get(path)

    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "etag", "accept-ranges", "content-type", "content-disposition"):
        assert head.headers[name] == get.headers[name]


def test_the_report_is_the_file_and_404_until_it_is_there(api: Api, job: dict[str, Any]) -> None:
    report = api.http.get(f"/jobs/{job['id']}/report")
    missing = api.http.get(f"/jobs/{api.job()}/report")

    assert report.headers["content-type"] == "application/json"
    assert isinstance(report.json(), dict)
    assert (missing.status_code, missing.json()["code"]) == (404, "artifact.not_found")


RANGES: list[dict[str, str]] = [{}, {"Range": "bytes=0-3"}, {"Range": "bytes=-4"}]


def flipped(content: bytes) -> bytes:
    """The content with one bit changed in the middle, where no length tells."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_a_large_object_that_was_changed_is_cut_off_before_its_end(
    api: Api, files: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    file, content = files["training.json"], random.Random(1).randbytes(5_000_000)
    (tmp_path / "large").write_bytes(content)
    large = api.blobs.put_file(tmp_path / "large")
    (path,) = Path(api.settings.url("store_url").removeprefix("file://")).rglob(large.sha256)
    stored = "update artifacts set sha256 = %s, size_bytes = %s where id = %s"
    try:
        with api.engine.begin() as conn:
            conn.exec_driver_sql(stored, (large.sha256, large.size_bytes, file["id"]))
        whole = api.http.get(f"/artifacts/{file['id']}/content")
        path.write_bytes(flipped(content))
        arrived = list[bytes]()
        download = api.http.stream("GET", f"/artifacts/{file['id']}/content")
        with download as answer, pytest.raises(httpx.RemoteProtocolError):
            arrived.extend(answer.iter_raw())
    finally:
        path.unlink()
        with api.engine.begin() as conn:
            conn.exec_driver_sql(stored, (file["sha256"], file["size_bytes"], file["id"]))

    assert whole.content == content
    assert 0 < len(b"".join(arrived)) < len(content)


def test_a_lost_or_changed_object_is_an_error_and_never_wrong_bytes(api: Api, files: dict[str, dict[str, Any]]) -> None:
    file = files["training.json"]
    (path,) = Path(api.settings.url("store_url").removeprefix("file://")).rglob(file["sha256"])
    content = path.read_bytes()
    try:
        path.write_bytes(flipped(content))
        changed = [api.http.get(f"/artifacts/{file['id']}/content", headers=range) for range in RANGES]
        path.write_bytes(content[:-1])
        cut = api.http.get(f"/artifacts/{file['id']}/content")
        path.unlink()
        lost = api.http.get(f"/artifacts/{file['id']}/content")
    finally:
        path.write_bytes(content)

    assert [(one.status_code, one.json()["code"]) for one in changed] == [(500, "store.object_corrupt")] * len(RANGES)
    assert (cut.status_code, cut.json()["code"]) == (500, "store.object_corrupt")
    assert (lost.status_code, lost.json()["code"]) == (500, "store.object_missing")


# --- head maps -------------------------------------------------------------------------------------------------------


def test_a_head_map_comes_as_json_picture_and_table(
    api: Api, job: dict[str, Any], files: dict[str, dict[str, Any]]
) -> None:
    path = f"/head-maps/{job['head_map']}"
    view = api.http.get(path).json()
    raw = api.http.get(f"{path}.json")
    svg = api.http.get(f"{path}.svg", params={"ratio": 0.5})
    table = api.http.get(f"{path}.csv")

    assert hashlib.sha256(raw.content).hexdigest() == files["head_map.json"]["sha256"]
    assert view["map"] == raw.json()
    assert (view["job_id"], view["scorer"]) == (job["id"], "uniform")
    assert svg.headers["content-type"] == "image/svg+xml"
    assert ET.fromstring(svg.text).tag.endswith("svg")
    assert table.text.splitlines()[0] == "rank,layer,head,score"
    assert len(table.text.splitlines()) == 1 + 2 * 4


def test_a_later_job_takes_up_a_head_map_and_a_selection(api: Api, job: dict[str, Any]) -> None:
    body = a_job(dataset=job["dataset_id"], heads={"head_map": job["head_map"]}, data={"selection": job["selection"]})

    answer = api.post(body)

    assert answer.status_code == 202, answer.text
    api.finish(answer.json()["id"])
    later = api.http.get(f"/jobs/{answer.json()['id']}").json()
    assert later["error"] is None
    assert (later["status"], later["head_map"], later["selection"]) == ("succeeded", None, None)


def test_a_selection_of_another_dataset_or_model_is_refused(api: Api, job: dict[str, Any]) -> None:
    from benchmarks.service import write_stub_model

    write_stub_model(api.settings.models_dir / "other")
    (api.settings.models_dir / "other" / "tokenizer.json").write_text('{"other": 1}')
    other_data = a_job(dataset=api.dataset(70, start=9000), data={"selection": job["selection"]})
    other_model = a_job(dataset=job["dataset_id"], base_model="other", heads={"head_map": job["head_map"]})

    assert api.post(other_data).json()["code"] == "selection.mismatch"
    assert api.post(other_model).json()["code"] == "head_map.mismatch"


@pytest.mark.parametrize("ending", ["", ".json", ".svg", ".csv"])
def test_a_head_map_that_is_not_there_is_404(api: Api, ending: str) -> None:
    answer = api.http.get(f"/head-maps/hm_01jd8m4q6t0000000000000000{ending}")
    assert (answer.status_code, answer.json()["code"]) == (404, "head_map.not_found")


def test_a_picture_of_an_impossible_ratio_is_refused(api: Api, job: dict[str, Any]) -> None:
    for ratio in ("0", "1.5", "nan", "x"):
        assert api.http.get(f"/head-maps/{job['head_map']}.svg", params={"ratio": ratio}).status_code == 422


# --- selections ------------------------------------------------------------------------------------------------------


def all_rows(api: Api, selection_id: str, **params: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        query = params | ({"cursor": cursor} if cursor else {})
        page = api.http.get(f"/selections/{selection_id}/rows", params=query).json()
        found += page["data"]
        cursor = page["next_cursor"]
        if not cursor:
            return found


def test_a_selection_is_paged_row_by_row(api: Api, job: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    view = api.http.get(f"/selections/{job['selection']}").json()
    content = api.http.get(f"/artifacts/{files['selection.jsonl']['id']}/content").text
    expected = [json.loads(line) for line in content.splitlines()]

    assert (view["rows"], view["kept"]) == (len(expected), sum(row["kept"] for row in expected))
    for limit in (1, 7, 100):
        assert all_rows(api, job["selection"], limit=limit) == expected
    kept = all_rows(api, job["selection"], limit=2, kept=True)
    assert kept == [row for row in expected if row["kept"]]
    assert len(all_rows(api, job["selection"], kept=False)) == len(expected) - len(kept)


def test_a_made_up_place_in_a_selection_is_refused(api: Api, job: dict[str, Any]) -> None:
    from app.api.cursors import write_cursor

    path = f"/selections/{job['selection']}/rows"
    mark = mark_of(api, path)
    for cursor in (write_cursor([10**9]), write_cursor([-1]), write_cursor("x"), write_cursor([1]), "é"):
        answer = api.http.get(path, params={"cursor": mark + cursor})
        assert (answer.status_code, answer.json()["code"]) == (422, "request.cursor"), cursor
