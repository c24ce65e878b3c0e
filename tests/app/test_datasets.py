"""Laws of datasets over HTTP: stored whole or not at all, the same content once, never held in memory."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.app.conftest import Api, a_job, mark_of, memory_bytes, rows, serving
from tests.rig import wait_for


def test_a_dataset_is_stored_described_and_reported(api: Api) -> None:
    answer = api.upload(rows(30, start=100), "sums.jsonl")

    assert answer.status_code == 201
    dataset = answer.json()
    assert answer.headers["Location"] == f"/datasets/{dataset['id']}"
    assert (dataset["name"], dataset["format"], dataset["rows"]) == ("sums.jsonl", "jsonl", 30)
    assert api.http.get(f"/datasets/{dataset['id']}").json() == dataset
    report = api.http.get(f"/datasets/{dataset['id']}/report").json()
    assert (report["rows"], report["duplicates"], report["warnings"]) == (30, 0, [])


def test_the_same_content_in_another_format_is_the_same_dataset(api: Api) -> None:
    first = api.upload(rows(20, start=300)).json()
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["question", "answer"])
    for line in rows(20, start=300).splitlines():
        writer.writerow(json.loads(line).values())

    content = text.getvalue().encode()
    again = api.upload(content, "sums.csv")

    assert again.status_code == 200
    came = hashlib.sha256(content).hexdigest()
    assert again.json() == {**first, "deduplicated": True, "received_sha256": came}


def test_a_compressed_file_is_the_same_dataset_and_says_how_it_came(api: Api) -> None:
    packed = gzip.compress(rows(25, start=6000))

    dataset = api.upload(packed, "sums.jsonl.gz").json()

    assert (dataset["format"], dataset["rows"], dataset["size_bytes"]) == ("jsonl", 25, len(packed))
    assert api.http.get(f"/datasets/{dataset['id']}/report").json()["compression"] == "gzip"
    assert api.upload(rows(25, start=6000)).json()["id"] == dataset["id"]


def test_a_dataset_says_the_sha256_of_the_bytes_that_made_it(api: Api) -> None:
    plain = rows(25, start=6200)
    packed = gzip.compress(plain)

    dataset = api.upload(packed).json()
    again = api.upload(plain).json()
    written_out = api.http.post(
        "/datasets", json={"rows": [json.loads(line) for line in rows(25, start=6300).splitlines()]}
    )
    job = api.send(a_job(), rows(60, start=6400))
    of_job = api.http.get(f"/datasets/{job.json()['dataset_id']}").json()

    assert dataset["raw_sha256"] == hashlib.sha256(packed).hexdigest()
    assert api.http.get(f"/datasets/{dataset['id']}/report").json()["raw_sha256"] == dataset["raw_sha256"]
    assert (again["deduplicated"], again["raw_sha256"]) == (True, dataset["raw_sha256"])
    assert again["received_sha256"] == hashlib.sha256(plain).hexdigest() != dataset["raw_sha256"]
    assert (written_out.status_code, written_out.json()["raw_sha256"]) == (201, None)
    assert of_job["raw_sha256"] == hashlib.sha256(rows(60, start=6400)).hexdigest()


def test_a_small_file_that_unpacks_above_the_limit_is_refused_and_leaves_nothing(api: Api) -> None:
    answer = api.upload(gzip.compress(b" " * (api.settings.max_upload_bytes + 1)))

    assert (answer.status_code, answer.json()["code"]) == (413, "dataset.too_large")
    assert api.uploading() == []


def german(count: int, *, start: int) -> bytes:
    """A CSV file of as many rows as `rows` gives, under other names."""
    lines = (json.loads(line) for line in rows(count, start=start).splitlines())
    return "".join(["Frage,Antwort\n", *(f"{row['question']},{row['answer']}\n" for row in lines)]).encode()


def test_a_file_with_other_column_names_is_the_same_dataset_and_the_report_says_so(api: Api) -> None:
    mapping = {"prompt": "Frage", "completion": "Antwort"}

    answer = api.upload(german(15, start=7000), "sums.csv", mapping=mapping)

    assert answer.status_code == 201, answer.text
    assert api.http.get(f"/datasets/{answer.json()['id']}/report").json()["mapping"] == mapping
    assert api.upload(rows(15, start=7000)).json()["id"] == answer.json()["id"]


def test_a_mapping_to_a_column_that_is_not_there_says_which_are(api: Api) -> None:
    answer = api.upload(german(5, start=7100), "sums.csv", mapping={"prompt": "Frage", "completion": "Reply"})

    assert (answer.status_code, answer.json()["code"]) == (422, "dataset.mapping")
    assert answer.json()["detail"] == "The file has no column 'Reply'; it has Frage, Antwort."
    assert api.uploading() == []


@pytest.mark.parametrize(
    ("mapping", "status", "pointer"),
    [
        (b"{", 400, "/mapping"),
        (b'["prompt"]', 422, "/mapping"),
        (b'{"prompt": 1}', 422, "/mapping/prompt"),
        (b'{"title": "x"}', 422, "/mapping/title"),
        (b"{" + b",".join(b'"%d": "x"' % number for number in range(99)) + b"}", 422, "/mapping"),
    ],
)
def test_a_mapping_that_is_none_is_refused(api: Api, mapping: bytes, status: int, pointer: str) -> None:
    answer = api.http.post("/datasets", files={"file": ("x", rows(4)), "mapping": (None, mapping)})

    assert answer.status_code == status, answer.text
    assert [fault.get("pointer") for fault in answer.json()["errors"]] == [pointer]


def test_equal_uploads_at_once_make_one_dataset(api: Api) -> None:
    before, content = api.count("datasets"), rows(50, start=700)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: api.upload(content), range(20)))

    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted(answer.status_code for answer in answers) == [200] * 19 + [201]
    assert api.count("datasets") == before + 1


def test_row_text_reaches_the_store_alone(api: Api) -> None:
    secret = "correct horse battery staple"
    line = json.dumps({"question": secret, "answer": "a"}) + "\n"
    dataset_id = api.upload(line.encode() + rows(5)).json()["id"]
    refused = api.upload((line + json.dumps({"question": secret, "answer": ""})).encode())

    assert secret not in refused.text
    with api.engine.connect() as conn:
        kept = conn.exec_driver_sql("select d::text from datasets d where id = %s", (dataset_id,)).scalar_one()
    assert secret not in kept


def test_a_file_that_costs_too_much_is_refused_and_the_service_stays_well(api: Api) -> None:
    limits = {"check_max_s": 0.01}  # Python alone takes longer to start
    with serving(api.settings.model_copy(update=limits)) as hurried:
        for answer in (hurried.upload(rows(40)), hurried.send(a_job(), rows(40))):
            problem = answer.json()
            assert (answer.status_code, problem["code"], problem["fault"]) == (422, "dataset.too_costly", "user")
            assert "P2D_CHECK_MAX_S" in problem["hint"]
        assert hurried.uploading() == []
        assert hurried.http.get("/readyz").status_code == 200


def test_a_deleted_dataset_is_gone_and_can_come_back(api: Api) -> None:
    dataset_id = api.dataset(12, start=900)

    assert api.http.delete(f"/datasets/{dataset_id}").status_code == 200

    assert api.http.get(f"/datasets/{dataset_id}").status_code == 404
    assert api.http.delete(f"/datasets/{dataset_id}").status_code == 404
    assert api.dataset(12, start=900) != dataset_id


def test_a_dataset_that_a_job_still_needs_cannot_be_deleted(api: Api) -> None:
    job = api.http.get(f"/jobs/{api.job()}").json()

    answer = api.http.delete(f"/datasets/{job['dataset_id']}")
    assert (answer.status_code, answer.json()["code"]) == (409, "dataset.in_use")

    api.http.post(f"/jobs/{job['id']}/cancel")
    assert api.http.delete(f"/datasets/{job['dataset_id']}").status_code == 200


def test_datasets_are_paged_newest_first(api: Api) -> None:
    made = [api.dataset(3 + number, start=4000 + 100 * number) for number in range(3)]

    first = api.http.get("/datasets", params={"limit": 2}).json()
    second = api.http.get("/datasets", params={"limit": 2, "cursor": first["next_cursor"]}).json()

    assert [entry["id"] for entry in (*first["data"], *second["data"])][:3] == made[::-1]


@pytest.mark.parametrize("cursor", ["x", "é", "bnVsbA", "W10", "Im5vIgo", "a" * 300])
def test_a_made_up_cursor_is_refused(api: Api, cursor: str) -> None:
    for start in range(2):
        api.dataset(3, start=4400 + 100 * start)
    for sent in (cursor, mark_of(api, "/datasets") + cursor):
        answer = api.http.get("/datasets", params={"cursor": sent})
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/query/cursor")


def test_a_cursor_is_good_for_its_list_in_its_order_alone(api: Api) -> None:
    datasets = [api.dataset(3, start=4600 + 100 * start) for start in range(2)]
    for name in ("one", "another"):
        api.job(name=name)
    cursor = api.http.get("/jobs", params={"limit": 1}).json()["next_cursor"]

    assert len(cursor) < 60
    assert api.http.get("/jobs", params={"cursor": cursor, "order": "desc"}).status_code == 200
    for path in ("/jobs?order=asc", "/datasets", f"/datasets/{datasets[0]}/rows"):
        answer = api.http.get(httpx.URL(path).copy_add_param("cursor", cursor))
        assert (answer.status_code, answer.json()["code"]) == (422, "request.cursor"), path
    of_one = api.http.get(f"/datasets/{datasets[0]}/rows", params={"limit": 1}).json()["next_cursor"]
    assert api.http.get(f"/datasets/{datasets[1]}/rows", params={"cursor": of_one}).status_code == 422


# --- bodies ----------------------------------------------------------------------------------------------------------


def form(*parts: bytes) -> dict[str, object]:
    """A multipart request made by hand."""
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n"
    return {"content": body, "headers": {"Content-Type": "multipart/form-data; boundary=b"}}


FILE = b'Content-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n{"question": "q", "answer": "a"}'

BAD_FORMS = {
    "no part": (form(), 422),
    "another part": (form(b'Content-Disposition: form-data; name="data"\r\n\r\nx'), 400),
    "a part without a name": (form(b"Content-Type: text/plain\r\n\r\nx"), 400),
    "a part sent twice": (form(FILE, FILE), 400),
    "a header without an end": (form(b"Content-Disposition: " + b"x" * 100_000), 400),
    "no boundary": ({"content": b"", "headers": {"Content-Type": "multipart/form-data"}}, 415),
    "no multipart at all": ({"content": b"{}", "headers": {"Content-Type": "application/json"}}, 422),
    "another type": ({"content": b"{}", "headers": {"Content-Type": "text/csv"}}, 415),
    "a body of another boundary": ({**form(FILE), "headers": {"Content-Type": "multipart/form-data; boundary=c"}}, 400),
    "a body that is cut off": ({**form(FILE), "content": b"--b\r\n" + FILE[:80]}, 400),
}


@pytest.mark.parametrize("what", BAD_FORMS)
def test_a_form_is_refused_with(api: Api, what: str) -> None:
    request, status = BAD_FORMS[what]

    answer = api.http.post("/datasets", **request)  # type: ignore[arg-type]

    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert api.uploading() == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\x\\y.jsonl", "\x00.jsonl", "x" * 5000, ""])
def test_a_file_name_is_a_label_and_never_a_path(api: Api, name: str) -> None:
    part = b'Content-Disposition: form-data; name="file"; filename="' + name.encode() + b'"\r\n\r\n' + rows(4)

    answer = api.http.post("/datasets", **form(part))  # type: ignore[arg-type]

    assert answer.status_code in (200, 201, 400), answer.text
    if answer.is_success:
        assert "/" not in answer.json()["name"]


def test_a_stream_without_a_length_is_cut_off_at_the_limit(api: Api) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(80):
            yield b"x" * 100_000

    answer = api.http.post("/datasets", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"})

    assert (answer.status_code, answer.json()["code"]) == (413, "dataset.too_large")
    assert api.uploading() == []


def test_an_upload_cut_at_any_place_leaves_nothing(api: Api) -> None:
    head = b"POST /datasets HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 2000000\r\n\r\n"
    body = b"--b\r\n" + FILE + b"\n" + rows(20_000)
    before = (api.count("datasets"), api.kept())

    for cut in (0, 3, 60, 65_536, 700_000, 1_048_577):
        with socket.create_connection((api.http.base_url.host, api.http.base_url.port or 80)) as client:
            client.sendall(head + body[:cut])

    wait_for(lambda: api.uploading() == [], "the uploads to be swept")
    assert (api.count("datasets"), api.kept()) == before
    assert api.http.get("/healthz").status_code == 200


def test_a_large_upload_does_not_fill_the_memory(api: Api, tmp_path: Path) -> None:
    settings = api.settings.model_copy(update={"max_upload_bytes": 200 << 20})
    path, line = tmp_path / "large.jsonl", {"question": "x" * 20_000, "answer": ""}
    with path.open("w") as file:
        for number in range(5000):
            file.write(json.dumps({**line, "answer": str(number)}) + "\n")
    with serving(settings) as large:
        before, peak, done = memory_bytes(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.02):
                peak = max(peak, memory_bytes())

        watching = threading.Thread(target=watch)
        watching.start()
        with path.open("rb") as sent:
            answer = large.http.post("/datasets", files={"file": sent}, timeout=httpx.Timeout(120))
        done.set()
        watching.join()

    assert answer.status_code == 201, answer.text
    assert path.stat().st_size > 100_000_000
    assert peak - before < 60 << 20, f"memory grew by {(peak - before) >> 20} MiB"
