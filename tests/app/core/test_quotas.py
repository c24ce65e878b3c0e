"""The quota of unfinished jobs: it holds whoever asks, and does not count all jobs for each new one."""

from __future__ import annotations

from typing import Any

import pytest

from app.access_errors import TooManyJobs
from app.core import quotas
from app.core.quotas import JobQuota
from app.settings import Settings


class Jobs:
    """The unfinished jobs of one project, and how often somebody counted them."""

    def __init__(self) -> None:
        self.open = self.counted = 0

    def count(self, _: object) -> int:
        self.counted += 1
        return self.open

    def make(self, quota: JobQuota, most: int) -> None:
        """Make jobs until the quota refuses or there are so many."""
        connection: Any = None
        while self.open < most:
            quota.allow(connection, "prj")
            self.open += 1


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs()
    monkeypatch.setattr(quotas, "open_jobs", made.count)
    monkeypatch.setattr(quotas, "lock_project", lambda *_: None)
    return made


def test_one_process_lets_exactly_as_many_through_as_the_quota_says(jobs: Jobs) -> None:
    quota = JobQuota(Settings(quota_jobs=100))
    with pytest.raises(TooManyJobs):
        jobs.make(quota, 101)
    assert jobs.open == 100

    jobs.open -= 1  # one has ended

    jobs.make(quota, 100)
    with pytest.raises(TooManyJobs):
        jobs.make(quota, 101)


def test_several_processes_that_counted_in_one_moment_go_an_eighth_beyond_it_at_most(jobs: Jobs) -> None:
    settings = Settings(quota_jobs=1_000, api_processes=3)
    processes = [JobQuota(settings) for _ in range(3)]
    for number, quota in enumerate(processes):
        jobs.make(quota, number + 1)  # each has counted while next to none were there

    for quota in processes:
        with pytest.raises(TooManyJobs):
            jobs.make(quota, 10_000)

    assert 1_000 <= jobs.open <= 1_125


def test_far_from_the_quota_hardly_anything_is_counted_and_later_it_is_counted_anew(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = JobQuota(Settings(quota_jobs=10_000))
    jobs.make(quota, 1_000)
    assert jobs.counted == 1

    monkeypatch.setattr(quotas, "COUNTED_S", -1.0)  # every count is old at once
    quota = JobQuota(Settings(quota_jobs=10_000))
    jobs.make(quota, 1_010)

    assert jobs.counted == 11
