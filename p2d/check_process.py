"""The process in which a stranger's dataset file is read: bounded by the kernel, with neither torch nor secrets in it.

    python -P -m p2d.check_process < request.json

A file that asks for too much, or breaks a parser's native code, ends this process and no other. It limits itself before it
opens the file, and writes what it found to `result`; a peak of memory goes along. Who starts it, and what its end means to
a user, is `app.core.reader`'s business.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from p2d.columns import mapped
from p2d.errors import DatasetEmpty, DatasetError, DatasetTooLarge, ErrorDetail, MappingInvalid
from p2d.validation import DataFile, DatasetLimits, DatasetReport, check_files

OUT_OF_MEMORY, DISK_FULL = 71, 72
"""How it ends where it cannot write a result; any other end without one is a crash."""

OPEN_FILES = 64

ERRORS: dict[str, type[DatasetError]] = {
    error.code: error for error in (DatasetError, DatasetEmpty, DatasetTooLarge, MappingInvalid)
}
"""What `check_files` raises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What the kernel lets it have."""

    memory_bytes: int
    """Address space; Python and pyarrow alone take 0.6 GiB of it."""
    seconds: float
    """Of the clock, and of the processor."""
    file_bytes: int
    """Of any file that it writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRequest:
    """What is to be checked, as `p2d.validation.check_files` takes it, and how far it may go."""

    files: Sequence[tuple[str, str]]
    """Path and name of each."""
    limits: DatasetLimits
    normalised: str
    listed: str
    """Where the bad lines are listed."""
    mapping: Mapping[str, str]
    result: str
    bounds: Bounds

    def to_json(self) -> str:
        """What the process reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CheckRequest:
        """Back from `to_json`."""
        data = json.loads(text)
        return cls(**{**data, "limits": DatasetLimits(**data["limits"]), "bounds": Bounds(**data["bounds"])})


def read_result(path: Path) -> tuple[DatasetReport, int]:
    """The report and the peak of memory in bytes. Raises what `check_files` raised."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if (error := found.get("error")) is not None:
        details = [ErrorDetail(**detail) for detail in error["errors"]]
        raise ERRORS[error["code"]](
            error["detail"], errors=details, errors_total=error["errors_total"], **error["facts"]
        )
    report = found["report"]
    tuples = {name: tuple(report[name]) for name in ("duplicate_lines", "warnings")}
    return DatasetReport(**{**report, **tuples}), found["peak_bytes"]


def main() -> None:
    """Check the files of one dataset."""
    sys.excepthook = _say_where
    request = CheckRequest.from_json(sys.stdin.read())
    _limit(request.bounds)
    try:
        found = _check(request)
        text = json.dumps({**found, "peak_bytes": _peak_bytes()})
        Path(request.result).write_text(text, encoding="utf-8")
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # whatever would be cleaned up may need memory too
    except OSError as error:
        if error.errno == errno.ENOMEM:
            os._exit(OUT_OF_MEMORY)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            os._exit(DISK_FULL)
        raise


def _check(request: CheckRequest) -> dict[str, Any]:
    try:
        try:
            report = check_files(
                [DataFile(path=Path(path), name=name) for path, name in request.files],
                request.limits,
                normalised=Path(request.normalised),
                columns=mapped(request.mapping),
                listed=Path(request.listed),
            )
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            limit = request.bounds.file_bytes  # a Parquet file may say one long text a million times
            raise DatasetTooLarge(f"The rows take more than {limit} bytes.", limit=limit) from error
    except DatasetError as error:
        return {"error": error.to_json()}
    return {"report": asdict(report)}


def _limit(bounds: Bounds) -> None:
    """Ask the kernel to hold the bounds. The alarm also ends a process whose parent is gone."""
    if sys.platform == "linux":  # macOS has the number and does not hold it
        _hold(resource.RLIMIT_AS, bounds.memory_bytes)
    _hold(resource.RLIMIT_CPU, max(1, round(bounds.seconds)))
    _hold(resource.RLIMIT_FSIZE, bounds.file_bytes)
    _hold(resource.RLIMIT_NOFILE, OPEN_FILES)
    _hold(resource.RLIMIT_CORE, 0)  # a core file would hold row text
    signal.setitimer(signal.ITIMER_REAL, bounds.seconds + 5)


def _hold(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _peak_bytes() -> int:
    status = Path("/proc/self/status")  # getrusage would count the parent's memory at the fork
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _say_where(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    """A traceback without its message, which may hold row text."""
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(tb)]
    sys.stderr.write("\n".join([kind.__name__, *places, ""]))


if __name__ == "__main__":
    main()
