"""Laws of reports: whatever refuses a file says all that is wrong with it, at an address of its own, for some days."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import httpx
import pytest

from app.core.garbage import clear
from p2d.client import Client
from tests.app.conftest import Api, a_job, rows
from tests.app.test_cli import p2d

BAD = b'{"question": "q"}\n'


def of(api: Api, refused: httpx.Response) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report on a refused file, and all its faults, some at a time."""
    path = refused.json()["report"]
    faults, more = [], f"{path}/errors?limit=70"
    while more:
        page = api.http.get(more)
        faults += [{name: value for name, value in one.items() if value is not None} for one in page.json()["data"]]
        more = page.links["next"]["url"] if page.json()["has_more"] else ""
    report: dict[str, Any] = api.http.get(path).json()
    assert report["errors_listed"] == len(faults)
    return report, faults


def test_every_bad_line_of_a_large_file_is_in_its_report_and_the_first_hundred_in_the_answer(
    api: Api, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = rows(4000).splitlines(keepends=True)
    bad = list(range(10, 4000, 16))
    for number in bad:
        lines[number - 1] = BAD if number % 80 == 10 else b"{\n"

    refused = api.upload(b"".join(lines), "sums.jsonl")

    problem, (report, faults) = refused.json(), of(api, refused)
    counts = {"row.not_json": 200, "row.missing_field": 50}
    assert (refused.status_code, problem["errors_total"], problem["facts"]["errors_by_code"]) == (422, 250, counts)
    assert [fault["line"] for fault in faults] == bad
    assert problem["errors"] == faults[:100]
    assert faults[0] == {"code": "row.missing_field", "pointer": "/answer", "line": 10} | {
        "message": faults[0]["message"]
    }
    assert (report["name"], report["format"], report["rows"]) == ("sums.jsonl", "jsonl", 4000 - 250)
    assert (report["errors_total"], report["errors_by_code"]) == (250, counts)
    assert api.http.get("/reports").json()["data"][0] == report
    good = api.http.get(f"/datasets/{api.dataset(7, start=50)}/report").json()
    assert good.keys() == report.keys()
    assert (good["errors_total"], good["rows"]) == (0, 7)

    monkeypatch.setenv("P2D_URL", api.url)
    status, said = p2d(capsys, monkeypatch, "report", report["id"])
    assert (status, said.count("line ")) == (0, 250)
    assert "sums.jsonl: 250 lines of the dataset cannot be used." in said
    with Client(api.url) as client:
        assert [fault.line for fault in client.faults(problem["report"])] == bad


def test_whatever_brings_a_file_its_faults_stand_where_they_are_in_the_request(api: Api) -> None:
    given = api.http.post("/datasets", json={"rows": [{"question": "q", "answer": "a"}, {"question": "q"}, 1]})
    assert [fault["pointer"] for fault in of(api, given)[1]] == ["/rows/1/answer", "/rows/2"]

    job = api.send(a_job(recipe="best"), rows(9) + BAD, validation_dataset=BAD + b"{\n")
    report, faults = of(api, job)
    assert [(fault["pointer"], fault["line"]) for fault in faults] == [
        ("/dataset/answer", 10),
        ("/validation_dataset/answer", 1),
        ("/validation_dataset", 2),
    ]
    assert job.json()["errors_total"] == 4  # the recipe's too
    assert report["name"] == "data.jsonl, validation_dataset.jsonl"

    content = rows(9) + BAD
    body = {"name": "parts.jsonl", "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    upload = api.http.post("/uploads", json=body).json()
    assert upload["part_count"] == 1
    assert api.http.put(f"/uploads/{upload['id']}/parts/1", content=content).is_success
    completed = api.http.post(f"/uploads/{upload['id']}/complete")
    assert [fault["line"] for fault in of(api, completed)[1]] == [10]

    empty = api.upload(b"")
    assert of(api, empty)[1] == [{"code": "dataset.empty", "message": "The dataset has no rows."}]
    before = api.count("reports")
    dry = api.http.post("/jobs?dry_run=true", json=a_job(dataset={"rows": [1]}))
    assert (dry.status_code, "report" in dry.json(), api.count("reports")) == (422, False, before)


def test_a_report_counts_while_it_stays_and_leaves_no_trace_of_the_rows(api: Api) -> None:
    secret = "correct horse battery staple"
    used = api.http.get("/usage").json()["stored_bytes"]
    texts = [json.dumps({"question": secret, "answer": "", secret: secret}), secret, json.dumps({secret: secret})]

    refused = api.upload("\n".join(texts).encode())

    report, faults = of(api, refused)
    assert len(faults) == 3
    assert secret not in json.dumps([refused.json(), report, faults])
    assert api.http.get("/usage").json()["stored_bytes"] > used
    receipt = api.http.delete(f"/reports/{report['id']}").json()
    assert (receipt["what"], len(receipt["sha256"])) == ("report", 1)
    assert api.http.get("/usage").json()["stored_bytes"] == used
    assert {api.http.get(f"/reports/{report['id']}{more}").status_code for more in ("", "/errors")} == {404}
    assert api.http.delete(f"/reports/{report['id']}").status_code == 404


def test_old_reports_go_with_their_objects_and_young_ones_stay(api: Api) -> None:
    old, young = (api.upload(BAD * count).json()["report"].split("/")[-1] for count in (31, 32))
    with api.engine.begin() as conn:
        held: dict[str, str] = {row[0]: row[1] for row in conn.exec_driver_sql("select id, sha256 from reports")}
        conn.exec_driver_sql("update reports set expires_at = now() where id = %s", (old,))
        conn.exec_driver_sql("update objects set used_at = now() - interval '2 days'")
    assert api.http.get(f"/reports/{old}").status_code == 404

    clear(api.engine, api.blobs, api.settings)

    assert api.http.get(f"/reports/{young}/errors").json()["data"][0]["code"] == "row.missing_field"
    assert held[young] in api.stored()
    assert held[old] not in api.stored()
    assert api.count(f"reports where id = '{old}'") == 0
