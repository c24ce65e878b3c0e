"""What the container files promise, read from the files: there is no Docker engine here to run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
LONG_RUNNING = [name for name in SERVICES if name != "migrate"]


def test_the_dockerfile_passes_its_linter() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"

    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)

    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_all_parts_of_the_service_are_there_and_migration_is_its_own_one_shot() -> None:
    assert set(SERVICES) == {"postgres", "valkey", "s3", "migrate", "api", "worker", "courier"}
    assert SERVICES["migrate"]["command"] == ["migrate"]
    assert SERVICES["migrate"]["restart"] == "no"
    for name in ("api", "worker"):
        assert SERVICES[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
        assert SERVICES[name]["command"] == [name]


def test_only_the_api_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}

    assert published == {"api": ["127.0.0.1:8321:8321"]}


def test_every_variable_must_be_given_and_none_has_a_default() -> None:
    text = "\n".join(line for line in COMPOSE.read_text().splitlines() if not line.lstrip().startswith("#"))
    variables = re.findall(r"(?<!\$)\$\{([^}]*)\}|(?<!\$)\$([A-Za-z_]\w*)", text)

    assert variables
    for braced, bare in variables:
        assert not bare
        assert re.fullmatch(r"[A-Z0-9_]+:\?.+", braced)
    named = {braced.split(":?")[0] for braced, _ in variables}
    example = (ROOT / ".env.example").read_text()
    assert named == set(re.findall(r"^([A-Z0-9_]+)=$", example, re.MULTILINE))


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_unprivileged(name: str) -> None:
    service = SERVICES[name]

    user, group = service["user"].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert not any("docker.sock" in volume for volume in service.get("volumes", []))


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_every_lasting_container_says_whether_it_is_well(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"]
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_who_computes_reaches_nobody_outside_and_another_sends_to_webhooks() -> None:
    worker, courier = SERVICES["worker"], SERVICES["courier"]

    assert (worker["networks"], worker["environment"]["P2D_WEBHOOK_HANDS"]) == (["data"], "0")
    assert "P2D_KEY_PEPPER" not in worker["environment"]
    assert courier["networks"] == ["data", "front"]
    assert courier["environment"]["P2D_WORKER_QUEUE"] != Settings().worker_queue
    assert courier["environment"]["P2D_KEY_PEPPER"] == SERVICES["api"]["environment"]["P2D_KEY_PEPPER"]


@pytest.mark.parametrize("name", ["postgres", "valkey", "s3"])
def test_images_of_others_are_pinned_and_reach_the_inner_network_only(name: str) -> None:
    assert re.fullmatch(r"[a-z/]+:[0-9]+\.[0-9][\w.-]*", SERVICES[name]["image"])
    assert SERVICES[name]["networks"] == ["data"]


def test_the_api_image_installs_no_engine() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    installs = {stage.splitlines()[0].split(" AS ")[1]: re.findall(r"pip install (.*)", stage) for stage in stages[1:]}

    assert installs == {"base": [], "api": ["-c constraints.txt ."], "worker": ["-c constraints.txt '.[engine]'"]}
