"""Laws of the service as a whole: it tells whether it can work, and it never loads the engine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from app.settings import Settings
from tests.app.conftest import Api, serving
from tests.s3_server import free_ports


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
