"""Loaded by schemathesis: of the right requests that it makes up, let most name what is there, so that they get past the door.

Wrong requests, and all of the first phase, stay as they are. What was answered to what is noted for the test.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import schemathesis
from schemathesis import GenerationMode
from schemathesis.generation.meta import TestPhase

HERE = json.loads(os.environ.get("P2D_TEST_HERE") or "{}")
"""What the test knows: `seed`, `answers` (a file), `dataset`, `key` (the id of the key in use), `ids`."""

PREFIX = {
    "jobs": "job",
    "datasets": "ds",
    "uploads": "upl",
    "artifacts": "art",
    "head-maps": "hm",
    "selections": "sel",
    "comparisons": "cmp",
    "reports": "rep",
    "keys": "key",
    "webhooks": "wh",
}
JOB = {"kind": "adapt", "base_model": "stub", "dataset": HERE.get("dataset"), "heads": {"proxy_rows": 8}}
HEADS = {name: JOB[name] for name in ("base_model", "dataset", "heads")}
BODIES = {
    "/jobs": JOB,
    "/estimates": JOB,
    "/jobs/{id}/clone": {"name": "again"},
    "/head-maps": HEADS,
    "/selections": HEADS,
    "/webhooks": {"url": "https://hooks.example/p2d"},
    "/webhooks/{id}": {"url": "https://hooks.example/moved"},
    "/comparisons": {"job_ids": HERE.get("jobs")},
}
"""JSON bodies that are good."""

rng = random.Random(HERE.get("seed"))
known = set(HERE.get("ids", ()))


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """The key of these requests is not revoked, nobody waits for what will not come, and right requests fit."""
    path, given = case.path_parameters, {*HERE["ids"], HERE["key"]}
    if case.method == "DELETE" and path.get("id") in given:
        path["id"] = path["id"].partition("_")[0] + "_" + 26 * "0"
    if isinstance(case.query.get("wait"), int | float):
        case.query["wait"] = min(case.query["wait"], 0.01)
    meta = case.meta
    if meta is None or meta.phase.name is TestPhase.COVERAGE or meta.generation.mode is not GenerationMode.POSITIVE:
        return
    if rng.random() < 0.25:
        return
    prefix = PREFIX.get(case.path.split("/")[1], "")
    there = sorted(
        one for one in known if one.startswith(prefix + "_") and not (case.method == "DELETE" and one in given)
    )
    if "id" in path and path["id"] not in known and there:
        path["id"] = rng.choice(there)
    if case.path.endswith("/diff"):
        case.query["with"] = rng.choice([one for one in known if one.startswith("hm_")])
    if "delivery" in path and (sent := sorted(one for one in known if one.startswith("whd_"))):
        path["delivery"] = rng.choice(sent)
    if case.path in BODIES and case.media_type == "application/json":
        case.headers.pop("Idempotency-Key", None)
        case.body = BODIES[case.path]


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Note the answer, and the ids in it."""
    with Path(HERE["answers"]).open("a") as file:
        file.write(f"{response.status_code} {case.method} {case.path}\n")
    if response.status_code in (201, 202):
        known.update(re.findall(r'"id":"(\w+)"', response.text))
