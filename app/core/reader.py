"""Read a stranger's dataset file in a process of its own, with bounds: what it breaks or eats up is never the service.

The process is `p2d.check_process`; here it is started, waited for, killed, and its end is put into words.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from app.dataset_errors import DatasetReaderDied, DatasetTooCostly
from app.errors import DiskFull
from app.settings import Settings
from p2d.check_process import DISK_FULL, OUT_OF_MEMORY, Bounds, CheckRequest, read_result
from p2d.columns import Columns
from p2d.validation import DataFile, DatasetLimits, DatasetReport

log = structlog.get_logger(__name__)

_TIME_UP = {-signal.SIGXCPU, -signal.SIGALRM}
_KILLED, _ABORTED = -signal.SIGKILL, -signal.SIGABRT


def check_apart(
    files: Sequence[DataFile], settings: Settings, *, normalised: Path, listed: Path, columns: Columns
) -> DatasetReport:
    """`p2d.validation.check_files` in a process of its own.

    Raises: as `check_files`; DatasetTooCostly, DatasetReaderDied, DiskFull.
    """
    bounds = Bounds(
        memory_bytes=settings.check_memory_bytes, seconds=settings.check_max_s, file_bytes=settings.check_file_bytes
    )
    result = normalised.with_name(normalised.name + ".result")
    request = CheckRequest(
        files=[(str(file.path), file.name) for file in files],
        limits=DatasetLimits(
            max_bytes=settings.max_upload_bytes, max_rows=settings.max_rows, max_row_bytes=settings.max_row_bytes
        ),
        normalised=str(normalised),
        listed=str(listed),
        mapping=columns.mapping,
        result=str(result),
        bounds=bounds,
    )
    started = time.monotonic()
    try:
        returncode, said = _run(request)
        if returncode != 0:
            log.warning("dataset.reader_ended", returncode=returncode, seconds=time.monotonic() - started)
            raise _why(returncode, said, bounds)
        report, peak_bytes = read_result(result)
    finally:
        result.unlink(missing_ok=True)
    log.info("dataset.checked", rows=report.rows, peak_bytes=peak_bytes, seconds=time.monotonic() - started)
    return report


def _run(request: CheckRequest) -> tuple[int, str]:
    """Its exit status and what it said of a crash. When this returns or raises, the process is gone."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "p2d.check_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=_environment(),
        process_group=0,
    )
    try:
        _, said = process.communicate(request.to_json().encode(), timeout=request.bounds.seconds)
        return process.returncode, said.decode(errors="replace")
    except subprocess.TimeoutExpired:
        return -signal.SIGALRM, ""
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _why(returncode: int, said: str, bounds: Bounds) -> Exception:
    if returncode in _TIME_UP:
        return DatasetTooCostly(f"Reading the file took more than {bounds.seconds:g} seconds.", seconds=bounds.seconds)
    if returncode in (OUT_OF_MEMORY, _KILLED) or (returncode == _ABORTED and "bad_alloc" in said):
        return DatasetTooCostly(
            f"Reading the file took more than {bounds.memory_bytes} bytes of memory.", memory_bytes=bounds.memory_bytes
        )
    if returncode == DISK_FULL:
        return DiskFull()
    if returncode < 0:
        return DatasetReaderDied(signal=signal.Signals(-returncode).name)
    return RuntimeError(f"p2d.check_process ended with {returncode}: {said[-2000:]}")


def _environment() -> dict[str, str]:
    """It imports from where the parent does and knows nothing else of it: no credential, no URL."""
    passed = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    return {
        **passed,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONUTF8": "1",
        # Threads and arenas reserve address space, which is what is bounded.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",
    }
