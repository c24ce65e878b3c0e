"""A job's life on one page, without SQL, time or threads: what `tests/app/core/test_job_model.py` holds the service to.

Written from the promises (docs/architecture.md, the words of the API), not from the code: where the two differ, one is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

STATUSES = ("queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed")
FINAL = ("cancelled", "succeeded", "failed")
MAX_CRASHES = 3

WORKED_ON = ("queued", "running", "pausing", "cancelling")
BEGUN = ("running", "pausing", "cancelling")
POSSIBLE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("patch", "stale", "reconcile", "collect"), STATUSES),
    "beat": WORKED_ON,
    **dict.fromkeys(("progress", "checkpoint"), BEGUN),
    "begin": (*WORKED_ON, "cancelled"),
    "claim": ("queued", "running"),
    **dict.fromkeys(("finish", "fail"), BEGUN),
    **dict.fromkeys(("lose", "release"), WORKED_ON),
    "stop": ("cancelling",),
    "expire": (*WORKED_ON, "cancelled"),
    "over_time": WORKED_ON,
    **dict.fromkeys(("cancel", "pause", "resume", "retry", "delete"), STATUSES),
}
"""Every event, and the statuses in which it can come, be it to be refused."""

FITTING = {
    "cancel": ("queued", "running", "pausing", "paused"),
    "pause": ("queued", "running"),
    "resume": ("pausing", "paused"),
    "retry": ("cancelled", "failed"),
    "delete": FINAL,
}
"""Where what a user asks for changes something."""


WAYS = (
    "",
    "claim",
    "claim lose",
    "claim pause begin resume",
    "claim begin finish pause resume claim",
    "claim begin",
    "claim begin lose",
    "claim begin finish claim",
    "claim pause",
    "claim begin pause",
    "claim begin lose claim begin pause",
    "pause",
    "claim begin pause release",
    "claim cancel",
    "claim begin cancel",
    "claim lose claim begin cancel",
    "cancel",
    "cancel_during_a_claim",
    "cancel_during_a_claim retry",
    "claim begin cancel stop",
    "claim begin fail",
    "claim begin finish claim begin finish claim begin finish",
)
"""Into each status, with every kind of worker that it can have: none, one that has begun or not, one that is late."""


class Refused(Exception):
    """The service must refuse this, and change nothing."""


@dataclass(kw_only=True)
class ModelStep:
    """A step; its token is the number of its attempts."""

    name: str
    shard: int
    after: tuple[str, ...]
    status: str = "blocked"
    crashes: int = 0
    checkpoint: bool = False
    output: str | None = None
    """What it is going to compute, where others may wait for it and take it."""
    attempts: list[str] = field(default_factory=list)

    def end(self, status: str, outcome: str) -> None:
        """Its newest attempt is over."""
        self.status = status
        self.attempts[-1] = outcome


@dataclass(kw_only=True)
class ModelJob:
    """A job and everything that may happen to it."""

    steps: list[ModelStep]
    reads: str | None = None
    """The job whose head map it reads."""
    path: list[str] = field(default_factory=lambda: ["queued"])
    cancel_asked: bool = False
    pause_asked: bool = False
    started: bool = False
    """A worker has begun it since it was last queued anew: its time runs, but for pauses."""
    clock_runs: bool = False
    retries: int = 0

    def __post_init__(self) -> None:
        self._unblock()

    @property
    def status(self) -> str:
        """As it is now."""
        return self.path[-1]

    def having(self, *statuses: str) -> list[ModelStep]:
        """Its steps in these statuses."""
        return [step for step in self.steps if step.status in statuses]

    # --- users ------------------------------------------------------------------------------------------------------

    def cancel(self, claiming: ModelStep | None = None) -> None:
        """Stop; `claiming` is a step whose claim is not yet to be seen."""
        if self.status == "cancelled":
            return
        self._refuse("succeeded", "failed")
        self.cancel_asked = True
        for step in self.having("blocked", "ready"):
            if step is not claiming:
                step.status = "cancelled"
        self._stopped()

    def pause(self) -> None:
        """Stand still."""
        if self.status in ("pausing", "paused"):
            return
        self._refuse("cancelling", *FINAL)
        self.pause_asked = True
        for step in self.having("ready"):
            step.status = "blocked"
        if self.having("running"):
            self.path.append("pausing")
        self._stands_still()

    def resume(self) -> None:
        """Go on."""
        if self.status in ("queued", "running"):
            return
        self._refuse("cancelling", *FINAL)
        self.pause_asked = False
        self._unblock()
        self.path.append("running" if self.status == "pausing" and self.clock_runs else "queued")

    def retry(self, *, inputs_left: bool) -> None:
        """Once more, keeping what is done."""
        self._refuse(*(status for status in STATUSES if status not in ("cancelled", "failed")))
        if not inputs_left:
            raise Refused
        self.cancel_asked = self.pause_asked = self.started = self.clock_runs = False
        for step in self.having(*{step.status for step in self.steps} - {"done"}):
            if step.status == "running":
                step.end("blocked", "cancelled")
            step.status, step.crashes = "blocked", 0
        self._unblock()
        self.retries += 1
        self.path.append("queued")

    def delete(self, *, needed: bool) -> None:
        """Forget it, unless another needs it."""
        self._refuse(*(status for status in STATUSES if status not in FINAL))
        if needed:
            raise Refused

    # --- workers and time -------------------------------------------------------------------------------------------

    def claim(self, step: ModelStep) -> None:
        """A worker takes a step."""
        step.status = "running"
        step.attempts.append("running")

    def begin(self) -> None:
        """Its worker starts, unless the job is to pause."""
        if self.status == "queued":
            self.path.append("running")
            self.started = self.clock_runs = True

    def finish(self, step: ModelStep) -> None:
        """Its worker has the outputs."""
        if self.cancel_asked:
            return self.stop(step)
        step.end("done", "done")
        step.checkpoint = False
        if not self.pause_asked:
            self._unblock()
        if len(self.having("done")) == len(self.steps):
            self.path.append("succeeded")
        else:
            self._stands_still()
        return None

    def fail(self, step: ModelStep) -> None:
        """Its worker says that trying again is in vain."""
        if self.cancel_asked:
            return self.stop(step)
        step.end("failed", "failed")
        return self.end_failed()

    def lose(self, step: ModelStep) -> None:
        """Its worker crashed or was not heard of for too long."""
        if self.status in FINAL or self.cancel_asked:
            return self.stop(step)
        step.crashes += 1
        step.end("blocked" if self.pause_asked else "ready", "lost")
        if step.crashes < MAX_CRASHES:
            return self._stands_still()
        step.status = "failed"
        return self.end_failed()

    def release(self, step: ModelStep) -> None:
        """Its worker gives it back."""
        if self.cancel_asked:
            return self.stop(step)
        step.end("blocked" if self.pause_asked else "ready", "released")
        return self._stands_still()

    def stop(self, step: ModelStep) -> None:
        """Its worker has stopped because the job was cancelled."""
        step.end("cancelled", "cancelled")
        if self.status not in FINAL:
            self._stopped()

    def end_failed(self) -> None:
        """The job is over now, whoever still works on it."""
        for step in self.having("running"):
            step.end("cancelled", "cancelled")
        for step in self.having("blocked", "ready"):
            step.status = "cancelled"
        self.path.append("failed")

    # --- inside -----------------------------------------------------------------------------------------------------

    def _refuse(self, *statuses: str) -> None:
        if self.status in statuses:
            raise Refused

    def _unblock(self) -> None:
        waited_for = {step.name for step in self.steps if step.status != "done"}
        for step in self.having("blocked"):
            if not waited_for & set(step.after):
                step.status = "ready"

    def _stands_still(self) -> None:
        if self.pause_asked and not self.having("running"):
            self.path.append("paused")
            self.clock_runs = False

    def _stopped(self) -> None:
        if self.having("running"):
            self.path += ["cancelling"] if self.status != "cancelling" else []
        else:
            self.path += ["cancelling"] if self.status == "running" else []
            self.path.append("cancelled")


def claimable(jobs: Iterable[ModelJob]) -> list[ModelStep]:
    """What a worker may take: of equal outputs one at a time."""
    jobs = list(jobs)
    computed = {step.output for job in jobs for step in job.having("running") if step.output is not None}
    return [step for job in jobs for step in job.having("ready") if step.output not in computed]
