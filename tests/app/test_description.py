"""What /openapi.json promises holds: no answer that it does not describe, no 5xx, whatever is sent and in whatever order.

schemathesis makes requests from the description itself, right and wrong ones, and follows what one answer gives into the
next request. `P2D_TEST_SEED=N` repeats a run; `P2D_TEST_DEEP=200 pytest tests/app/test_description.py` goes on for minutes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.keys import make_key
from app.db.projects import DEFAULT_PROJECT
from app.problems import MEDIA_TYPE, STATUS
from app.settings import Settings
from tests.app.conftest import Api, a_job, described, serving
from tests.rig import ROOT

OPERATIONS_THAT_MUST_GO_WELL = 30
"""Of 64: a run that only meets closed doors proves nothing. What can go well depends a little on the seed; 48 did."""

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "use_after_free",
    "negative_data_rejection",
)


@pytest.fixture(scope="module")
def api(module_settings: Settings) -> Iterator[Api]:
    """A service that has no limit in the way."""
    open_door = {"rate_per_minute": 1_000_000, "quota_jobs": 100_000, "quota_webhooks": 100_000}
    with serving(module_settings.model_copy(update=open_door)) as api:
        yield api


CONFIG = """
[checks]
enabled = false
{checks}
[phases.coverage]
unexpected-methods = ["PUT", "TRACE"]
[phases.fuzzing.generation]
max-examples = {examples}
[phases.stateful]
max-steps = 12
[phases.stateful.generation]
max-examples = {examples}
# A key is revoked, not removed: it stays to be read.
[[operations]]
include-name = "GET /keys/{{id}}"
[operations.checks.use_after_free]
enabled = false
"""


def explore(api: Api, folder: Path, seed: int, *, examples: int, phases: str) -> Counter[str]:
    """Let schemathesis loose on the service: how often each operation gave what; its own report is the failure's message."""
    dataset = api.dataset()
    ranked = {"scorer": "attribution", "proxy_rows": 8}  # a head map that can be compared
    job_id = str(api.post(a_job(dataset=dataset, heads=ranked)).json()["id"])
    api.finish(job_id)  # something of every kind is there to be found
    job, files = api.http.get(f"/jobs/{job_id}").json(), api.http.get(f"/jobs/{job_id}/artifacts").json()["data"]
    jobs = [job_id, str(api.post(a_job(dataset=dataset)).json()["id"])]
    comparison = str(api.http.post("/comparisons", json={"job_ids": jobs}).json()["id"])
    report = str(api.upload(b"{").json()["report"]).rpartition("/")[2]
    with api.engine.begin() as conn:
        key, text = make_key(conn, api.settings, project_id=DEFAULT_PROJECT, scope="admin")
    ids = [dataset, *jobs, comparison, report, job["head_map"], job["selection"], *(file["id"] for file in files)]
    answers = folder / "answers"
    here = {"seed": seed, "answers": str(answers), "dataset": dataset, "key": key.id, "ids": ids, "jobs": jobs}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.app.requests_that_fit"}
    checks = "\n".join(
        f"{name}.enabled = true" for name in CHECKS
    )  # a list on the command line would overrule exceptions
    (folder / "schemathesis.toml").write_text(CONFIG.format(examples=examples, checks=checks))
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{api.url}/openapi.json"]
    command += [
        "--phases",
        phases,
        "-H",
        f"Authorization: Bearer {text}",
    ]
    command += ["--seed", str(seed), "--generation-database", "none", "--continue-on-failure", "--no-color"]
    command += ["--suppress-health-check", "all", "--warnings", "off", "--request-timeout", "20"]
    env["P2D_TEST_HERE"] = json.dumps(here)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, f"P2D_TEST_SEED={seed}\n{done.stdout[-30_000:]}\n{done.stderr[-5_000:]}"
    return Counter(answers.read_text().splitlines())


def test_every_operation_names_its_answers_and_the_codes_of_each() -> None:
    for form, operations in described():
        for method, operation in operations.items():
            where = f"{method} {form.pattern}"
            assert operation["responses"].keys() >= {"422", "500"}, where
            for status, answer in operation["responses"].items():
                assert re.fullmatch(r"[2-5]\d\d", status), where  # no "default": it would describe any answer
                assert answer["description"], where
                if status >= "400":
                    codes = answer["content"][MEDIA_TYPE]["schema"]["properties"]["code"]["enum"]
                    assert {STATUS[code] for code in codes} == {int(status)}, where


def test_every_post_takes_an_idempotency_key() -> None:
    posts = {form.pattern: operations["post"] for form, operations in described() if "post" in operations}
    taking = {path for path, post in posts.items() for one in post["parameters"] if one["name"] == "Idempotency-Key"}

    assert taking == posts.keys()


@pytest.mark.timeout(900)
@pytest.mark.skipif(os.environ.get("P2D_TEST_SERVERS") == "machine", reason="the same code as before")
def test_no_answer_is_outside_of_the_description(api: Api, tmp_path: Path, seed: int) -> None:
    answers = explore(api, tmp_path, seed, examples=4, phases="fuzzing,stateful")

    assert len({answer[4:] for answer in answers if answer.startswith("2")}) >= OPERATIONS_THAT_MUST_GO_WELL, answers


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    "P2D_TEST_DEEP" not in os.environ, reason="P2D_TEST_DEEP=N asks N examples of every operation: minutes"
)
def test_no_answer_is_outside_of_the_description_in_depth(api: Api, tmp_path: Path, seed: int) -> None:
    explore(api, tmp_path, seed, examples=int(os.environ["P2D_TEST_DEEP"]), phases="coverage,fuzzing,stateful")
