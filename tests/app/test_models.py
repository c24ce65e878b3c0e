"""Laws of checking a model before it is installed: what its config.json says, and why it cannot be used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.app.conftest import MODEL, Api

NOTHING_INSTALLED = {"digest", "parameters", "dtype"}


def config_of(api: Api) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((api.settings.models_dir / MODEL / "config.json").read_bytes())
    return config


def test_a_config_alone_says_what_the_installed_model_says(api: Api) -> None:
    answer = api.http.post("/models/check", json={"name": MODEL, "config": config_of(api)})

    installed = api.http.get(f"/models/{MODEL}").json()
    assert answer.status_code == 200, answer.text
    assert answer.json() == {**installed, **dict.fromkeys(NOTHING_INSTALLED)}


def test_a_model_is_found_by_its_digest_too(api: Api) -> None:
    installed = api.http.get(f"/models/{MODEL}").json()

    assert api.http.get(f"/models/{installed['digest']}").json() == installed
    unknown = api.http.get(f"/models/{'0' * 64}")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "model.not_found")


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"model_type": "mamba"}, "model.unsupported", "supported: "),
        ({"model_type": 5}, "model.unsupported", "supported: "),
        ({"quantization_config": {"bits": 4}}, "model.unsupported", "quantised"),
        ({"num_key_value_heads": 3}, "model.invalid", "do not divide"),
        ({"hidden_size": "big"}, "model.invalid", "hidden_size"),
        ({"num_hidden_layers": None}, "model.invalid", "num_hidden_layers"),
    ],
)
def test_a_model_that_cannot_be_used_says_why(api: Api, change: dict[str, Any], code: str, said: str) -> None:
    answer = api.http.post("/models/check", json={"name": "theirs", "config": config_of(api) | change})

    assert answer.status_code == 200, answer.text
    assert (answer.json()["name"], answer.json()["supported"]) == ("theirs", False)
    assert answer.json()["error"]["code"] == code
    assert said in answer.json()["error"]["detail"]


@pytest.mark.parametrize("body", [{}, {"config": []}, {"config": {}, "path": "/etc"}, {"config": {}, "name": "../x"}])
def test_what_is_no_config_is_refused(api: Api, body: dict[str, Any]) -> None:
    answer = api.http.post("/models/check", json=body)

    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid")
