"""The worker's process: what it refuses to load, and that it does not linger when it is broken."""

from __future__ import annotations

import subprocess
import sys

from tests.rig import ROOT


def test_the_worker_and_its_parent_side_leave_torch_unloaded() -> None:
    code = "import sys, workers.celery_app; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert done.stdout.strip() == "[]"


def test_a_thread_that_dies_of_a_bug_takes_the_process_along() -> None:
    code = (
        "import threading, time\n"
        "from workers.celery_app import _crash\n"
        "threading.excepthook = _crash\n"
        "threading.Thread(target=lambda: 1 / 0, name='loop').start()\n"
        "time.sleep(60)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)

    assert done.returncode == 1
    assert "worker.broken" in done.stdout + done.stderr
