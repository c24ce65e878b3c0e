"""Laws of data by reference over HTTP: off by default, checked like a file that is sent, and its origin is kept."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import obstore
import pyarrow
import pyarrow.parquet
import pytest
from obstore.store import S3Store
from pydantic import SecretStr
from typer.testing import CliRunner

from app.cli import cli
from app.core.intake import SEATS, WAITING
from app.core.quotas import IN_FLIGHT
from app.core.sources import fetch_object
from app.dataset_errors import SourceRefused
from app.settings import Settings
from p2d.client import Client, ServiceProblem
from tests.app.conftest import Api, a_job, rows, serving
from tests.hub import COMMIT, repository
from tests.rig import wait_for
from tests.s3_server import KEYS
from tests.tls_server import World, send


def refer(api: Api, source: dict[str, Any], **more: Any) -> httpx.Response:
    headers = {"Idempotency-Key": more.pop("key")} if "key" in more else {}
    return api.http.post("/datasets", json={"source": source, **more}, headers=headers)


def https(path: str) -> dict[str, Any]:
    return {"type": "https", "url": f"https://data.example{path}"}


def test_nothing_is_fetched_by_default(api: Api) -> None:
    answer = refer(api, https("/rows.jsonl"))

    assert (answer.status_code, answer.json()["code"], answer.json()["fault"]) == (403, "source.egress_off", "user")
    assert "P2D_EGRESS" in answer.json()["hint"]


def test_a_file_behind_a_url_becomes_a_dataset_that_says_where_it_came_from(fetching: Api, world: World) -> None:
    content = rows(30, start=9000)
    world.serve("/sets/sums.jsonl", content)

    answer = refer(fetching, https("/sets/sums.jsonl?signature=canary"))

    assert answer.status_code == 201, answer.text
    dataset = answer.json()
    assert (dataset["name"], dataset["rows"]) == ("sums.jsonl", 30)
    source = fetching.http.get(f"/datasets/{dataset['id']}/report").json()["source"]
    assert (source["type"], source["url"]) == ("https", "https://data.example/sets/sums.jsonl")
    assert (source["sha256"], source["size_bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert dataset["raw_sha256"] == source["sha256"]
    assert fetching.upload(content).json()["id"] == dataset["id"]
    assert fetching.uploading() == []


def test_a_file_of_the_hub_is_fetched_at_its_commit(fetching: Api, world: World) -> None:
    world.serve("/blob", rows(12, start=9100))
    world.redirect(
        f"/datasets/owner/sums/resolve/{COMMIT}/data/train.jsonl", "https://cdn.example/blob?signature=canary"
    )
    source = {"type": "hf", "repo": "owner/sums", "path": "data/train.jsonl", "revision": COMMIT}

    answer = refer(fetching, source)

    assert answer.status_code == 201, answer.text
    kept = fetching.http.get(f"/datasets/{answer.json()['id']}/report").json()["source"]
    assert (kept["type"], kept["revision"]) == ("hf", COMMIT)
    assert kept["url"] == f"https://huggingface.co/datasets/owner/sums/resolve/{COMMIT}/data/train.jsonl"


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "a b"},
        {"revision": "../main"},
        {"revision": ""},
        {"repo": "../sums"},
        {"repo": "sums"},
        {"path": "../../api/x"},
        {"path": "a?b"},
        {"path": ""},
        {"config": "default"},
        {"split": "train"},
    ],
)
def test_a_hub_file_is_a_plain_path_at_a_revision(fetching: Api, world: World, change: dict[str, str]) -> None:
    before = len(world.asked)

    answer = refer(fetching, {"type": "hf", "repo": "owner/sums", "path": "train.jsonl", "revision": COMMIT, **change})

    assert (answer.status_code, answer.json()["code"]) == (422, "source.invalid")
    assert len(world.asked) == before


def serve_repository(world: World, files: dict[str, bytes], *, revision: str = "main", **more: Any) -> None:
    """A repository as the Hub's API describes it, and its files at its commit."""
    world.serve(f"/api/datasets/owner/sums/revision/{revision}", json.dumps(repository([*files], **more)).encode())
    for path, content in files.items():
        world.serve(f"/datasets/owner/sums/resolve/{COMMIT}/{path}", content)


def parquet(content: bytes) -> bytes:
    table = pyarrow.Table.from_pylist([json.loads(line) for line in content.splitlines()])
    pyarrow.parquet.write_table(table, sink := pyarrow.BufferOutputStream())
    return bytes(sink.getvalue())


def test_a_config_and_split_of_the_hub_become_one_dataset_at_the_commit_of_a_branch(
    fetching: Api, world: World
) -> None:
    parts = [rows(7, start=9600), rows(5, start=9607)]
    files = {f"data/train-0000{number}-of-00002.parquet": parquet(part) for number, part in enumerate(parts)}
    serve_repository(world, {**files, "data/test-00000-of-00001.parquet": parquet(rows(3))})

    answer = refer(fetching, {"type": "hf", "repo": "owner/sums", "split": "train"})

    assert answer.status_code == 201, answer.text
    report = fetching.http.get(f"/datasets/{answer.json()['id']}/report").json()
    assert (answer.json()["name"], report["rows"], report["format"]) == ("owner/sums default/train", 12, "parquet")
    source = report["source"]
    assert (source["revision"], source["config"], source["split"]) == (COMMIT, "default", "train")
    assert source["url"] == f"https://huggingface.co/datasets/owner/sums/tree/{COMMIT}"
    assert [one["path"] for one in source["files"]] == [*files]
    assert source["files"][1]["sha256"] == hashlib.sha256([*files.values()][1]).hexdigest()
    assert source["sha256"] == hashlib.sha256(b"".join(files.values())).hexdigest()
    assert fetching.upload(rows(12, start=9600)).json()["id"] == answer.json()["id"]
    assert fetching.uploading() == []


def test_a_card_names_configs_and_a_file_may_be_named_at_a_branch(fetching: Api, world: World) -> None:
    configs = [{"config_name": "sums", "data_files": [{"split": "train", "path": "sums/*.jsonl"}]}]
    files = {"sums/a.jsonl": rows(4, start=9700), "sums/b.jsonl": rows(4, start=9710), "c.jsonl": rows(4, start=9720)}
    serve_repository(world, files, revision="refs%2Fpr%2F1", configs=configs)
    hub = {"type": "hf", "repo": "owner/sums", "revision": "refs/pr/1"}

    by_split, by_path = refer(fetching, {**hub, "config": "sums"}), refer(fetching, {**hub, "path": "c.jsonl"})
    missing = refer(fetching, {**hub, "config": "products"})

    assert (by_split.status_code, by_split.json()["rows"]) == (201, 8)
    assert (by_path.status_code, by_path.json()["rows"]) == (201, 4)
    assert fetching.http.get(f"/datasets/{by_path.json()['id']}/report").json()["source"]["revision"] == COMMIT
    assert (missing.status_code, missing.json()["detail"]) == (422, "Name one config; the repository has sums.")


def test_a_bad_line_of_several_files_is_told_with_its_file(fetching: Api, world: World) -> None:
    serve_repository(world, {"train-1.jsonl": rows(4, start=9800), "train-2.jsonl": rows(2) + b"{\n"}, revision="bad")

    answer = refer(fetching, {"type": "hf", "repo": "owner/sums", "revision": "bad"})

    fault = answer.json()["errors"][0]
    assert (answer.status_code, fault["line"]) == (422, 3)
    assert fault["message"].startswith("train-2.jsonl: ")


def test_files_together_may_not_be_larger_than_one(fetching: Api, world: World) -> None:
    half = rows(12_000)
    assert len(half) < 1_000_000 < 2 * len(half)  # the limit of this egress
    serve_repository(world, {"train/1.jsonl": half, "train/2.jsonl": half}, revision="large")

    answer = refer(fetching, {"type": "hf", "repo": "owner/sums", "revision": "large"})

    assert (answer.status_code, answer.json()["code"]) == (413, "dataset.too_large")
    assert fetching.uploading() == []


@pytest.mark.parametrize("said", [b"{}", b"[]", b"<html>", b'{"sha": "main", "siblings": []}', b"[" * 100_000])
def test_an_api_that_answers_otherwise_is_a_failed_source(fetching: Api, world: World, said: bytes) -> None:
    world.serve("/api/datasets/owner/odd/revision/main", said)

    answer = refer(fetching, {"type": "hf", "repo": "owner/odd"})

    assert (answer.status_code, answer.json()["code"]) == (502, "source.failed")


def test_bad_lines_of_a_fetched_file_are_listed_and_nothing_stays(fetching: Api, world: World) -> None:
    world.serve("/bad.jsonl", b'{"question": "q"}\n' + rows(3))

    answer = refer(fetching, https("/bad.jsonl"))

    assert (answer.status_code, answer.json()["errors"][0]["line"]) == (422, 1)
    assert fetching.http.get(answer.json()["report"]).json()["source"]["url"].endswith("/bad.jsonl")
    assert fetching.uploading() == []


def test_a_mapping_holds_for_a_fetched_file(fetching: Api, world: World) -> None:
    world.serve("/german.csv", b"Frage,Antwort\n1 + 1?,2\n2 + 2?,4\n")

    answer = refer(fetching, https("/german.csv"), mapping={"prompt": "Frage", "completion": "Antwort"})

    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize(
    "url",
    [
        *("https://127.0.0.1/x", "https://169.254.169.254/latest", "https://[::1]/", "https://2130706433/"),
        *("https://inside.example/x", "https://data.example/inside", "https://elsewhere.org/"),
    ],
)
def test_what_is_not_public_or_not_allowed_is_refused(fetching: Api, world: World, url: str) -> None:
    world.redirect("/inside", "https://169.254.169.254/latest/meta-data/")

    answer = refer(fetching, {"type": "https", "url": url})

    assert (answer.status_code, answer.json()["code"]) == (403, "source.refused")


def test_a_source_that_fails_says_whose_fault_it_is(fetching: Api) -> None:
    answer = refer(fetching, https("/missing"))

    assert (answer.status_code, answer.json()["code"], answer.json()["fault"]) == (502, "source.failed", "dependency")
    assert answer.json()["retryable"]


def test_hosts_that_never_end_leave_room_for_all_other_requests(fetching: Api, world: World) -> None:
    let_go, held = threading.Event(), fetching.dataset()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        let_go.wait(60)
        send(handler, 200, rows(5, start=9100))

    world.answers["/slow.jsonl"] = slow
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        fetches = [pool.submit(refer, fetching, https("/slow.jsonl")) for _ in range(IN_FLIGHT)]
        try:
            wait_for(lambda: world.asked.count("data.example/slow.jsonl") == SEATS, "all seats to be taken")
            wait_for(lambda: sum(one.done() for one in fetches) >= IN_FLIGHT - SEATS - WAITING, "the refusals")
            others = [fetching.http.get(path, timeout=10) for path in ("/healthz", "/readyz", "/jobs")]
            made = fetching.http.post("/jobs", json=a_job(dataset=held), timeout=10)
        finally:
            let_go.set()
        answers = [one.result() for one in fetches]

    assert [answer.status_code for answer in [*others, made]] == [200, 200, 200, 202]
    refused = [answer for answer in answers if not answer.is_success]
    assert {(answer.status_code, answer.json()["code"]) for answer in refused} == {(503, "service.intake_full")}
    assert {(answer.json()["fault"], answer.headers["retry-after"]) for answer in refused} == {("capacity", "10")}
    assert SEATS <= len(answers) - len(refused) <= SEATS + WAITING


def test_a_request_that_comes_again_is_not_fetched_again(fetching: Api, world: World) -> None:
    world.serve("/once.jsonl", rows(5, start=9200))
    first = refer(fetching, https("/once.jsonl"), key="a-key")
    asked = len(world.asked)

    again = refer(fetching, https("/once.jsonl"), key="a-key")

    assert (again.json(), again.headers["Idempotency-Replayed"]) == (first.json(), "true")
    assert len(world.asked) == asked
    assert refer(fetching, https("/other.jsonl"), key="a-key").json()["code"] == "idempotency.mismatch"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"source": None},
        {"source": {"type": "ftp"}},
        {"source": {"type": "https"}},
        {"source": https("/x"), "more": 1},
    ],
)
def test_a_body_that_names_no_source_is_refused(fetching: Api, body: dict[str, Any]) -> None:
    answer = fetching.http.post("/datasets", json=body)

    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid")


@pytest.fixture
def bucket(s3_url: str, module_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A service that may read below one prefix of a bucket; its store is elsewhere."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    query = s3_url.partition("?")[2]
    store = S3Store("p2d", endpoint=query.partition("=")[2].partition("&")[0], client_options={"allow_http": True})
    for key, start in (("open/sums.jsonl", 9300), ("closed/sums.jsonl", 9400), ("opened.jsonl", 9500)):
        obstore.put(store, key, rows(10, start=start))
    obstore.put(store, "open/large", b"x" * (module_settings.max_upload_bytes + 1))
    with serving(module_settings.model_copy(update={"source_buckets": (f"s3://p2d/open?{query}",)})) as api:
        yield api


def test_an_object_of_an_open_bucket_becomes_a_dataset_and_no_other_does(bucket: Api, s3_url: str) -> None:
    answer = refer(bucket, {"type": "s3", "url": "s3://p2d/open/sums.jsonl"})

    assert answer.status_code == 201, answer.text
    source = bucket.http.get(f"/datasets/{answer.json()['id']}/report").json()["source"]
    assert (source["url"], source["sha256"]) == (
        "s3://p2d/open/sums.jsonl",
        hashlib.sha256(rows(10, start=9300)).hexdigest(),
    )
    refusals = {
        "s3://p2d/closed/sums.jsonl": "source.refused",
        "s3://p2d/opened.jsonl": "source.refused",
        "s3://other/open/sums.jsonl": "source.refused",
        "s3://p2d/open/../closed/sums.jsonl": "source.invalid",
        "s3://p2d/open//sums.jsonl": "source.invalid",
        "s3://p2d/open/sums.jsonl?endpoint=http://127.0.0.1": "source.invalid",
        "s3://user@p2d/open/sums.jsonl": "source.refused",
        "https://p2d/open/sums.jsonl": "source.invalid",
        "s3://p2d/open/missing": "source.failed",
        "s3://p2d/open/large": "dataset.too_large",
    }
    found = {url: refer(bucket, {"type": "s3", "url": url}).json()["code"] for url in refusals}
    assert found == refusals
    assert bucket.uploading() == []


def test_the_stores_own_bucket_is_never_a_source(s3_url: str, module_settings: Settings, tmp_path: Path) -> None:
    own = module_settings.model_copy(update={"store_url": SecretStr(s3_url), "source_buckets": (s3_url,)})

    with pytest.raises(SourceRefused):
        fetch_object(own, "s3://p2d/some/prefix/sha256/aa/x", tmp_path / "file")


def test_a_bucket_is_closed_by_default(api: Api) -> None:
    assert refer(api, {"type": "s3", "url": "s3://p2d/open/sums.jsonl"}).json()["code"] == "source.egress_off"


def test_hosts_are_set_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2D_EGRESS", "data.example, *.hf.co")

    assert Settings().egress == ("data.example", "*.hf.co")
    monkeypatch.setenv("P2D_EGRESS", "")
    assert Settings().egress == ()


# --- from the command line and from Python ---------------------------------------------------------------------------


def p2d(api: Api, *arguments: str) -> str:
    """What a command prints."""
    done = CliRunner().invoke(cli, [*arguments, "--url", api.url])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output.strip()


def last_line(printed: str) -> str:
    """The id: the service in this process has logged before it."""
    return printed.splitlines()[-1]


def test_sources_are_taken_on_the_command_line(fetching: Api, world: World) -> None:
    world.serve("/cli.jsonl", rows(40, start=11_000))
    serve_repository(world, {"en/train.jsonl": rows(12, start=11_100), "de/train.jsonl": rows(3)}, revision="v1")

    dataset = last_line(p2d(fetching, "upload", "--source", "https://data.example/cli.jsonl"))
    job_id = last_line(
        p2d(
            fetching,
            *("submit", "--base-model", "stub", "--data", dataset, "--validation", "hf:owner/sums@v1/en/train"),
            *("--set", "heads.proxy_rows=8"),
        )
    )
    foreseen = p2d(
        fetching,
        *("submit", "--base-model", "stub", "--data", "https://data.example/cli.jsonl", "--dry-run"),
        *("--set", "heads.proxy_rows=8"),
    )

    job = fetching.http.get(f"/jobs/{job_id}").json()
    source = fetching.http.get(f"/datasets/{job['validation_dataset_id']}/report").json()["source"]
    assert job["dataset_id"] == dataset
    assert (source["config"], source["split"], source["files"][0]["path"]) == ("en", "train", "en/train.jsonl")
    assert "AER" in foreseen


@pytest.mark.parametrize("arguments", [(), ("x.jsonl", "--source", "hf:a/b"), ("--source", "ftp://data.example/x")])
def test_upload_takes_one_file_or_one_source(fetching: Api, arguments: tuple[str, ...]) -> None:
    assert "Usage" in p2d(fetching, "upload", *arguments)


def test_what_the_service_says_of_a_source_is_said_on(fetching: Api) -> None:
    with pytest.raises(ServiceProblem, match="owner/name") as refused:
        p2d(fetching, "upload", "--source", "hf:one")

    assert (refused.value.code, refused.value.errors[0].pointer) == ("source.invalid", "/source")


def test_the_client_takes_sources_and_rows(fetching: Api, world: World) -> None:
    world.serve("/client.jsonl", rows(40, start=12_000))
    written = {"rows": [{"Q": f"{n}?", "A": str(n)} for n in range(20)]}
    body = {"kind": "adapt", "base_model": "stub", "heads": {"proxy_rows": 8}}

    with Client(fetching.url) as client:
        made = client.upload(written, mapping={"prompt": "Q", "answer": "A"})
        job = client.submit(body, dataset="https://data.example/client.jsonl", validation_dataset=made)
        with pytest.raises(ValueError, match="no source"):
            client.upload("ds_1")

    assert fetching.http.get(f"/datasets/{job.raw['dataset_id']}").json()["rows"] == 40
    assert job.raw["validation_dataset_id"] == made
