"""Laws of the service as a whole: it tells whether it can work, and it never loads the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from app.access_errors import NotMigrated
from app.main import may_listen
from app.settings import Settings
from migrations import upgrade
from tests.app.conftest import Api, serving
from tests.app.db.test_tables import empty_database
from tests.conftest import Servers
from tests.rig import wait_for
from tests.s3_server import free_ports
from workers.loop import Worker


def test_a_service_with_all_its_servers_is_ready(api: Api) -> None:
    assert api.http.get("/healthz").json() == {"status": "ok"}
    assert api.http.get("/readyz").json() == {
        "status": "ok",
        "checks": {"database": "ok", "store": "ok", "broker": "ok"},
    }
    assert api.http.get("/version").json()["version"]


def test_without_a_broker_jobs_are_accepted_all_the_same(api: Api) -> None:
    nobody = f"redis://127.0.0.1:{free_ports(1)[0]}/0"
    settings = Settings.model_validate({**api.settings.model_dump(), "broker_url": nobody})
    with serving(settings) as lonely:
        ready = lonely.http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert lonely.job().startswith("job_")


def test_without_a_database_the_service_says_unavailable_and_try_again(api: Api) -> None:
    nobody = f"postgresql://p2d:x@127.0.0.1:{free_ports(1)[0]}/p2d"
    settings = Settings.model_validate({**api.settings.model_dump(), "database_url": nobody})
    with serving(settings) as lonely:
        for path in ("/readyz", "/jobs"):
            answer = lonely.http.get(path)
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.headers["retry-after"] == "5"
        assert lonely.http.get("/readyz").json()["facts"]["checks"]["database"] == "unavailable"
        assert lonely.http.get("/healthz").status_code == 200


def test_before_the_database_is_migrated_everybody_says_so_and_afterwards_goes_on(
    api: Api, servers: Servers, tmp_path: Path
) -> None:
    home = {"home": tmp_path, "work_dir": tmp_path / "work", "worker_queue": "unmigrated"}
    empty = {"database_url": empty_database(servers.database_url, "not_migrated_yet"), **home}
    settings = Settings.model_validate({**api.settings.model_dump(), **empty})
    worker = Worker(settings)
    worker.start()
    with serving(settings) as early, capture_logs() as lines:
        for path in ("/readyz", "/jobs", "/metrics"):
            answer = early.http.get(path)
            assert (answer.status_code, answer.json()["code"]) == (503, "database.not_migrated")
            assert "p2d migrate" in answer.json()["hint"]
        assert early.http.get("/readyz").json()["facts"]["checks"]["database"] == "not_migrated"
        wait_for(lambda: any("p2d migrate" in line.get("hint", "") for line in lines), "the worker's word")
        with pytest.raises(NotMigrated):
            may_listen(settings.model_copy(update={"host": "0.0.0.0"}))

        upgrade(early.engine)

        assert early.http.get("/readyz").json()["checks"]["database"] == "ok"
        job_id = early.job()
        wait_for(lambda: early.http.get(f"/jobs/{job_id}").json()["status"] == "succeeded", "the job's end")
    worker.stop()
    assert worker.join(30)


def test_a_database_may_be_ahead_of_the_code_but_not_behind(api: Api) -> None:
    def change(statement: str) -> int:
        with api.engine.begin() as conn:
            conn.exec_driver_sql(statement)
        return api.http.get("/readyz").status_code

    assert change("alter table jobs add column of_a_later_version text") == 200
    assert change("alter table jobs rename column name to nobodys") == 503
    assert api.http.get("/jobs").json()["code"] == "database.not_migrated"
    assert change("alter table jobs rename column nobodys to name") == 200


@pytest.mark.parametrize("module", ["app.main", "workers.loop"])
def test_importing_the_service_leaves_the_engine_unloaded(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_models_are_listed_with_what_is_wrong_with_them(api: Api) -> None:
    (api.settings.models_dir / "empty").mkdir()
    found = {entry["name"]: entry for entry in api.http.get("/models").json()["data"]}

    assert found["stub"]["supported"]
    assert (found["stub"]["n_heads"], found["stub"]["n_kv_groups"]) == (4, 2)
    assert not found["empty"]["supported"]
    assert found["empty"]["error"]["code"] == "model.invalid"
    assert api.http.get("/models/empty").json() == found["empty"]
    assert api.http.get("/models/nobody").status_code == 404


def test_the_description_of_the_api_names_its_errors_and_both_bodies(api: Api) -> None:
    document = api.http.get("/openapi.json").json()
    post = document["paths"]["/jobs"]["post"]

    assert set(post["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert "dataset.too_small" in post["responses"]["422"]["description"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "application/problem+json" in operation["responses"]["422"]["content"], path
