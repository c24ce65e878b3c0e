"""Laws of comparisons over HTTP: made of jobs that are there, computed from their files, and forgotten without a trace."""

from __future__ import annotations

import csv
import io
from typing import Any

import httpx
import pytest

from tests.app.conftest import Api, a_job


@pytest.fixture(scope="module")
def jobs(api: Api) -> list[str]:
    """Two jobs over the same rows that have ended, one of other rows, and one that waits."""
    same, other = api.dataset(), api.dataset(90, start=500)
    made = [
        api.post(a_job(dataset=same, name="few heads", heads={"ratio": 0.1, "proxy_rows": 8})).json()["id"],
        api.post(a_job(dataset=same, name="more heads", heads={"ratio": 0.5, "proxy_rows": 8})).json()["id"],
        api.post(a_job(dataset=other, name="other rows")).json()["id"],
    ]
    api.finish(*made)
    return [*made, str(api.post(a_job(dataset=same, name="waits")).json()["id"])]


def compare(api: Api, job_ids: list[str], **fields: Any) -> httpx.Response:
    return api.http.post("/comparisons", json={"job_ids": job_ids, **fields})


def made(api: Api, job_ids: list[str], **fields: Any) -> str:
    answer = compare(api, job_ids, **fields)
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == f"/comparisons/{answer.json()['id']}"
    return str(answer.json()["id"])


def test_jobs_over_the_same_rows_are_compared_in_everything(api: Api, jobs: list[str]) -> None:
    found = api.http.get(f"/comparisons/{made(api, jobs[:2])}").json()

    (pair,) = found["pairs"]
    assert pair["reasons"] == {}
    assert pair["heads"]["rank_correlation"] == pytest.approx(1.0)
    assert pair["heads"]["chosen"]["shared"] == pair["heads"]["chosen"]["one"] < pair["heads"]["chosen"]["other"]
    assert pair["rows"]["jaccard"] == 1.0
    assert pair["loss"]["difference"] == pytest.approx(-0.4 / 5)
    assert pair["loss"]["verdict"] == "other"
    assert [setting["pointer"] for setting in found["settings"]] == ["/heads/ratio"]
    assert [metrics["aer"] for metrics in found["metrics"]] == [0.5, 0.5]
    assert found["curves"]["tokens"][-1] == 8 * 40
    assert [job["missing"] for job in found["jobs"]] == [[], []]


def test_what_a_job_does_not_have_is_null_and_the_reason_stands_there(api: Api, jobs: list[str]) -> None:
    found = api.http.get(f"/comparisons/{made(api, [jobs[0], jobs[2], jobs[3]])}").json()

    reasons = {(pair["one"], pair["other"]): pair["reasons"] for pair in found["pairs"]}
    assert reasons[0, 1] == {
        "heads": "the head map of one of them ranks nothing",
        "loss": "they were evaluated on different rows",
    }
    assert set(reasons[0, 2]) == {"heads", "rows", "loss"}
    assert found["jobs"][2]["status"] == "queued"
    assert "report.json" in found["jobs"][2]["missing"]
    assert found["pairs"][0]["rows"]["shared"] == 0


def test_the_same_as_a_page_and_as_a_table(api: Api, jobs: list[str]) -> None:
    comparison = made(api, jobs[:3], name="heads & rows")

    page = api.http.get(f"/comparisons/{comparison}.html")
    table = api.http.get(f"/comparisons/{comparison}.csv")

    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "heads &amp; rows" in page.text
    assert "more heads" in page.text
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert {row["section"] for row in rows} >= {"settings", "metrics", "heads", "rows", "loss", "curve"}


def test_jobs_that_cannot_be_compared_are_named(api: Api, jobs: list[str]) -> None:
    absent = "job_" + 26 * "0"

    missing = compare(api, [jobs[0], absent])
    twice = compare(api, [jobs[0], jobs[1], jobs[0]])

    assert (missing.status_code, missing.json()["code"]) == (404, "job.not_found")
    assert missing.json()["errors"][0]["pointer"] == "/job_ids/1"
    assert (twice.status_code, twice.json()["errors"][0]["pointer"]) == (422, "/job_ids/2")
    assert compare(api, [jobs[0]]).status_code == 422
    assert compare(api, [f"job_{n:026d}" for n in range(21)]).status_code == 422


def test_a_key_makes_one_comparison(api: Api, jobs: list[str]) -> None:
    before = api.count("comparisons")
    body = {"job_ids": jobs[:2]}

    first, again = (api.http.post("/comparisons", json=body, headers={"Idempotency-Key": "cmp"}) for _ in range(2))

    assert again.json() == first.json()
    assert again.headers["Idempotency-Replayed"] == "true"
    assert api.count("comparisons") == before + 1


def test_a_comparison_outlives_its_jobs_and_is_forgotten_when_asked(api: Api, jobs: list[str]) -> None:
    gone = str(api.post(a_job(dataset=api.dataset())).json()["id"])
    comparison = made(api, [jobs[0], gone], name="to go")
    assert comparison in [one["id"] for one in api.http.get("/comparisons").json()["data"]]
    api.http.post(f"/jobs/{gone}/cancel")
    assert api.http.delete(f"/jobs/{gone}").status_code == 200

    found = api.http.get(f"/comparisons/{comparison}").json()
    assert [job["status"] for job in found["jobs"]] == ["succeeded", "deleted"]

    assert api.http.delete(f"/comparisons/{comparison}").status_code == 204
    for ending in ("", ".csv", ".html"):
        answer = api.http.get(f"/comparisons/{comparison}{ending}")
        assert (answer.status_code, answer.json()["code"]) == (404, "comparison.not_found")
    assert api.http.delete(f"/comparisons/{comparison}").status_code == 404
