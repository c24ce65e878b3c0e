"""Laws of tenants: whoever is not of the project, or not allowed, gets nothing of it and changes nothing, on any route.

The matrix is made from /openapi.json: a route that is not known here fails it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psycopg
import pytest

from app.access_errors import RoleMissing
from app.core.keys import make_key
from app.db.api_keys import Scope, revoke_key
from app.db.engine import NOBODY, Connection, Engine, for_project, make_engine
from app.db.jobs import list_jobs
from app.db.projects import open_project
from app.db.tables import metadata
from app.main import create_app
from app.settings import Settings
from migrations import upgrade
from tests.app.conftest import Api, a_job, rows, serving
from tests.conftest import Servers

SHARED = {"objects", "tallies"}
"""Tables that belong to no project, and of which no route shows more than sums."""

OPEN = {"/healthz", "/readyz", "/version", "/errors/{code}"}
FOR_THE_OPERATOR = "/metrics"
FOR_ADMINS = ("/keys", "/webhooks", "/audit", FOR_THE_OPERATOR)
OF_ALL = ("/models",)
"""Resources of the service, not of a project."""

PREFIX = {
    "jobs": "job_",
    "datasets": "ds_",
    "uploads": "upl_",
    "artifacts": "art_",
    "head-maps": "hm_",
    "selections": "sel_",
    "webhooks": "wh_",
    "comparisons": "cmp_",
    "reports": "rep_",
}


def operations() -> list[tuple[str, str]]:
    """Every method and path of the service."""
    paths = create_app(Settings()).openapi()["paths"]
    return [(method.upper(), path) for path in sorted(paths) for method in sorted(paths[path])]


OPERATIONS = operations()
CLOSED = [(method, path) for method, path in OPERATIONS if path not in OPEN]


@dataclass(frozen=True, slots=True)
class Tenants:
    """A service with two projects; `owner` has one of everything, `other` has nothing."""

    api: Api
    owner: dict[str, str]
    """Keys of the first project: by scope, and `expired` and `revoked`."""
    other: str
    """An admin key of the second one."""
    ids: dict[str, str]
    """The owner's things: path segment -> id."""
    secrets: frozenset[str]
    """Words that only the owner's things hold."""

    def ask(self, method: str, path: str, key: str | None) -> httpx.Response:
        """Send a request about the owner's things."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        return self.api.http.request(method, self.place(path), headers=headers, content=b"{}")

    def place(self, path: str) -> str:
        """The path with the owner's ids in it. An id that is not known here fails the test."""
        room = path.split("/")[1]
        path = path.replace("{id}", self.ids[room]) if "{id}" in path else path
        for name, value in (
            ("number", "1"),
            ("row", "0"),
            ("ref", "stub"),
            ("delivery", self.ids["deliveries"]),
            ("code", "internal.error"),
        ):
            path = path.replace("{" + name + "}", value)
        path += f"?with={self.ids['head-maps']}" if path.endswith("/diff") else ""
        assert "{" not in path, f"add an id for {path} to this test"
        return path


def key(engine: Engine, settings: Settings, project: str, scope: Scope, *, days: float | None = None) -> str:
    """A new key's text."""
    with engine.begin() as conn:
        return make_key(conn, settings, project_id=open_project(conn, project), scope=scope, expires_days=days)[1]


def id_of(text: str) -> str:
    return "key_" + text.split("_")[1]


@pytest.fixture(scope="module")
def tenants(module_settings: Settings) -> Iterator[Tenants]:
    with serving(module_settings) as api:
        settings, engine = api.settings, api.engine
        owner = {scope: key(engine, settings, "owner", scope) for scope in ("read", "write", "admin")}
        owner |= {
            "expired": key(engine, settings, "owner", "admin", days=1),
            "revoked": key(engine, settings, "owner", "admin"),
        }
        with engine.begin() as conn:
            conn.exec_driver_sql("update api_keys set expires_at = now() where id = %s", (id_of(owner["expired"]),))
            revoke_key(conn, id_of(owner["revoked"]))
        with authorized(api, owner["write"]):
            ids = one_of_everything(api)
        with authorized(api, owner["admin"]):
            ids |= a_webhook(api)
        ids["keys"] = id_of(owner["read"])
        other = key(engine, settings, "other", "admin")
        yield Tenants(api, owner, other, ids, frozenset({*ids.values(), "owners-secret"}))


class authorized:
    """Let the client of the service send a key while the block runs."""

    def __init__(self, api: Api, key: str) -> None:
        self._http, self._key = api.http, key

    def __enter__(self) -> None:
        self._before = self._http.headers.get("Authorization")
        self._http.headers["Authorization"] = f"Bearer {self._key}"

    def __exit__(self, *error: object) -> None:
        del self._http.headers["Authorization"]
        if self._before is not None:
            self._http.headers["Authorization"] = self._before


def one_of_everything(api: Api) -> dict[str, str]:
    """The ids of one thing of each kind, with a word of the owner's in each name."""
    ranked = {"scorer": "attribution", "proxy_rows": 8}  # a head map that ranks, to be compared
    job_id = api.job(name="owners-secret", metadata={"owners-secret": "x"}, heads=ranked)
    api.finish(job_id)
    job = api.http.get(f"/jobs/{job_id}").json()
    assert job["status"] == "succeeded"
    artifacts = api.http.get(f"/jobs/{job_id}/artifacts").json()["data"]
    upload = api.http.post("/uploads", json={"size_bytes": 10, "name": "owners-secret"}).json()
    dataset = api.upload(rows(61), name="owners-secret.jsonl").json()
    jobs = [job_id, api.job(name="owners-secret")]
    comparison = api.http.post("/comparisons", json={"job_ids": jobs, "name": "owners-secret"}).json()
    ids = {
        "jobs": job_id,
        "comparisons": comparison["id"],
        "datasets": dataset["id"],
        "reports": api.upload(b"{", name="owners-secret.jsonl").json()["report"].split("/")[-1],
        "uploads": upload["id"],
        "artifacts": artifacts[0]["id"],
    }
    return {**ids, "head-maps": job["head_map"], "selections": job["selection"]}


def a_webhook(api: Api) -> dict[str, str]:
    """The ids of a webhook and of a delivery to it."""
    body = {"url": "https://hooks.example/owners-secret", "description": "owners-secret"}
    webhook = api.http.post("/webhooks", json=body).json()
    delivery = api.http.post(f"/webhooks/{webhook['id']}/test").json()
    return {"webhooks": webhook["id"], "deliveries": delivery["id"]}


def everything(conn: Connection) -> dict[str, Any]:
    """All rows of all tables, but for when keys were last used."""
    found: dict[str, Any] = {}
    for table in metadata.sorted_tables:
        texts = conn.exec_driver_sql(f"select (to_jsonb(t) - 'used_at')::text from {table.name} t order by 1")
        found[table.name] = [row[0] for row in texts]
    return found


@pytest.fixture
def unchanged(tenants: Tenants) -> Iterator[None]:
    """The test leaves the ledger as it was."""
    with tenants.api.engine.connect() as conn:
        before = everything(conn)
    yield
    with tenants.api.engine.connect() as conn:
        assert everything(conn) == before


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("state", ["no", "unknown", "malformed", "expired", "revoked"])
def test_without_a_good_key_every_route_answers_401(tenants: Tenants, state: str) -> None:
    good = tenants.owner["admin"]
    keys = {
        "no": None,
        "unknown": good[:-4] + ("aaaa" if good[-4:] != "aaaa" else "bbbb"),
        "malformed": "p2d_x",
        **tenants.owner,
    }
    for method, path in CLOSED:
        answer = tenants.ask(method, path, keys[state])
        assert (answer.status_code, answer.json()["code"]) == (401, "auth.key_refused"), (method, path)
        assert answer.headers["www-authenticate"] == 'Bearer realm="p2d"'
        assert not told(tenants, answer), (method, path)


@pytest.mark.usefixtures("unchanged")
def test_a_key_of_too_small_a_scope_gets_403_on_every_route(tenants: Tenants) -> None:
    refused = 0
    for method, path in CLOSED:
        needed = "admin" if path.startswith(FOR_ADMINS) else "read" if method == "GET" else "write"
        for scope in {"read": [], "write": ["read"], "admin": ["read", "write"]}[needed]:
            answer = tenants.ask(method, path, tenants.owner[scope])
            shown = answer.headers.get("www-authenticate", "")
            refused += 1
            assert (answer.status_code, answer.json()["code"]) == (403, "auth.insufficient_scope"), (method, path)
            assert shown.startswith('Bearer realm="p2d", error="insufficient_scope", scope="')
            assert not told(tenants, answer), (method, path)
    assert refused > 10


@pytest.mark.usefixtures("unchanged")
def test_what_another_project_has_answers_404_on_every_route(tenants: Tenants) -> None:
    asked = [(method, path) for method, path in CLOSED if "{id}" in path]
    for method, path in asked:
        answer = tenants.ask(method, path, tenants.other)
        assert answer.status_code == 404, (method, path, answer.text)
        assert answer.json()["code"].endswith(".not_found")
        # The id that was asked for is said again, and nothing else.
        assert told(tenants, answer) <= {tenants.ids[path.split("/")[1].partition(".")[0]]}, (method, path)
    assert {path.split("/")[1] for _, path in asked} >= PREFIX.keys()


def test_lists_hold_what_is_the_projects_own(tenants: Tenants) -> None:
    for path in ["/jobs", "/comparisons", "/datasets", "/uploads", "/reports", "/head-maps", "/selections"]:
        assert tenants.ask("GET", path, tenants.other).json()["data"] == []
        assert len(tenants.ask("GET", path, tenants.owner["read"]).json()["data"]) > 0
    assert [one["project"] for one in tenants.ask("GET", "/keys", tenants.other).json()["data"]] == ["other"]
    assert tenants.ask("GET", "/webhooks", tenants.other).json()["data"] == []
    assert len(tenants.ask("GET", "/webhooks", tenants.owner["admin"]).json()["data"]) == 1


def test_a_delivery_is_found_through_its_own_webhook_alone(tenants: Tenants) -> None:
    with authorized(tenants.api, tenants.other):
        mine = a_webhook(tenants.api)
        foreign = f"/webhooks/{mine['webhooks']}/deliveries/{tenants.ids['deliveries']}/redeliver"
        answer = tenants.api.http.post(foreign)
        tenants.api.http.delete(f"/webhooks/{mine['webhooks']}")

    assert (answer.status_code, answer.json()["code"]) == (404, "delivery.not_found")
    assert len(tenants.ask("GET", "/keys", tenants.owner["admin"]).json()["data"]) == 5


def test_the_owner_is_answered_on_every_route_that_reads(tenants: Tenants) -> None:
    for method, path in CLOSED:
        if method == "GET" and "events" not in path and path != FOR_THE_OPERATOR:
            answer = tenants.ask(method, path, tenants.owner["admin"])
            assert answer.status_code == 200, (path, answer.text)


def test_open_routes_need_no_key(tenants: Tenants) -> None:
    for path in (*OPEN, "/openapi.json"):
        assert tenants.api.http.get(path.replace("{code}", "internal.error")).status_code == 200
    document = tenants.api.http.get("/openapi.json").json()
    assert document["security"] == [{"key": []}]
    assert {path for path, verbs in document["paths"].items() if verbs.get("get", {}).get("security") == []} == OPEN


def test_a_job_cannot_name_what_another_project_has(tenants: Tenants) -> None:
    ids = tenants.ids
    own: dict[str, dict[str, Any]] = {
        "dataset": {"dataset": ids["datasets"]},
        "head_map": {"heads": {"proxy_rows": 8, "head_map": ids["head-maps"]}},
    }
    own["selection"] = {"data": {"selection": ids["selections"]}}
    own["artifact"] = {"base_model": ids["artifacts"]}
    own["webhook"] = {"webhooks": [ids["webhooks"]]}
    with authorized(tenants.api, tenants.other):
        mine = tenants.api.dataset(61)
        for name, fields in own.items():
            answer = tenants.api.post({**a_job(dataset=mine), **fields})
            assert (answer.status_code, answer.json()["code"]) == (404, f"{name}.not_found")
        dataset = tenants.api.http.get(f"/datasets/{mine}").json()
    assert dataset["id"] != ids["datasets"]


def test_the_same_content_and_the_same_idempotency_key_are_two_things_in_two_projects(tenants: Tenants) -> None:
    found = []
    for one in (tenants.owner["write"], tenants.other):
        with authorized(tenants.api, one):
            answer = tenants.api.http.post(
                "/datasets", files={"file": ("x.jsonl", rows(33))}, headers={"Idempotency-Key": "the-same"}
            )
        assert answer.status_code == 201
        assert "idempotency-replayed" not in answer.headers
        found.append(answer.json())
    assert [one["deduplicated"] for one in found] == [False, False]
    assert found[0]["id"] != found[1]["id"]
    assert found[0]["content_hash"] == found[1]["content_hash"]


# --- below the repository ------------------------------------------------------------------------------------------------


def test_a_transaction_that_speaks_for_no_project_sees_no_row_of_any_table(tenants: Tenants) -> None:
    with for_project(tenants.api.engine, NOBODY).connect() as conn:
        assert list_jobs(conn, limit=10) == []
        assert conn.exec_driver_sql("select current_user").scalar_one() == "p2d_api"
        for table in held_tables():
            assert conn.exec_driver_sql(f"select count(*) from {table}").scalar_one() == 0, table
    with tenants.api.engine.connect() as conn:  # and the next one of the pool is the owner's again
        assert len(list_jobs(conn, limit=10)) > 0


def test_every_table_is_held_by_row_level_security(tenants: Tenants) -> None:
    query = "select relname, relrowsecurity from pg_class where relkind in ('r', 'p') and relnamespace = 'public'::regnamespace"
    with tenants.api.engine.connect() as conn:
        held = {row[0]: row[1] for row in conn.exec_driver_sql(query)}
        reads = conn.exec_driver_sql("select has_table_privilege('p2d_api', 'alembic_version', 'select')").scalar_one()
        role = conn.exec_driver_sql(
            "select rolsuper, rolbypassrls, rolcanlogin from pg_roles where rolname = 'p2d_api'"
        ).one()
    del held["alembic_version"]
    assert not reads
    assert held == dict.fromkeys(held_tables(), True) | dict.fromkeys(SHARED, False)
    assert tuple(role) == (False, False, False)


def test_a_project_cannot_write_a_row_of_another(tenants: Tenants) -> None:
    with tenants.api.engine.connect() as conn:
        owner, other = (open_project(conn, name) for name in ("owner", "other"))
    with for_project(tenants.api.engine, other).connect() as conn:
        assert conn.exec_driver_sql("update jobs set name = 'x'").rowcount == 0
        with pytest.raises(Exception, match="row-level security"):
            conn.exec_driver_sql(
                "insert into uploads (id, project_id, name, size_bytes, part_bytes, expires_at) "
                "values ('u', %s, '', 1, 1, now())",
                (owner,),
            )


@pytest.mark.parametrize("table", ["events", "attempts"])
def test_a_page_of_a_jobs_rows_looks_at_no_other_jobs(tenants: Tenants, table: str) -> None:
    with for_project(tenants.api.engine, NOBODY).connect() as conn:
        plan = conn.exec_driver_sql(f"explain select * from {table} where job_id = 'x' limit 200").scalars().all()

    assert any("SubPlan" in line for line in plan)
    assert not any("hashed" in line for line in plan), "\n".join(plan)


def test_a_user_who_may_make_no_role_is_told_what_an_administrator_runs(servers: Servers) -> None:
    admin = servers.database_url
    with psycopg.connect(admin, autocommit=True) as conn:
        conn.execute("create role plain login password 'x' nosuperuser nocreaterole")
        conn.execute("create database plain owner plain template template0")
        engine = make_engine(f"postgresql://plain:x@{admin.split('@')[1].rpartition('/')[0]}/plain")
        try:
            with pytest.raises(RoleMissing, match='GRANT p2d_api TO "plain";'):
                upgrade(engine)
            conn.execute("grant p2d_api to plain")
            upgrade(engine)
            with for_project(engine, NOBODY).connect() as confined:
                assert list_jobs(confined, limit=1) == []
        finally:
            engine.dispose()


def held_tables() -> list[str]:
    """Tables whose rows belong to projects."""
    return [table.name for table in metadata.sorted_tables if table.name not in SHARED]


def told(tenants: Tenants, answer: httpx.Response) -> set[str]:
    """What of the owner's an answer holds beside the path that was asked."""
    text = answer.text.replace(answer.url.path, "") + json.dumps(dict(answer.headers))
    return {word for word in tenants.secrets if re.search(re.escape(word), text)}
