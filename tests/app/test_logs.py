"""Every line that a process of the service logs is one JSON object, whoever wrote it, and holds no byte of a stranger's body."""

from __future__ import annotations

import json
import subprocess
import sys

LOGS = """
import logging
import structlog
from app.logs import configure_logs

configure_logs()
structlog.get_logger().info("step.begun", job_id="job_1")
logging.getLogger("uvicorn.error").warning("%s is odd", "this")
logging.getLogger("python_multipart.multipart").warning("Expected boundary character 45, got 97")
try:
    secret_row = "never shown"
    raise ValueError("broken")
except ValueError:
    logging.getLogger("some.library").exception("it failed")
"""


def test_lines_of_ours_and_of_libraries_are_json_alike() -> None:
    done = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True, check=True)

    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["step.begun", "this is odd", "it failed"]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert all(line["timestamp"].endswith("Z") for line in lines)
    assert lines[2]["exception"][0]["exc_value"] == "broken"
    assert "never shown" not in done.stderr
