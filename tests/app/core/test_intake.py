"""Laws of the seats of those who bring files: no more at once than there are, some for every project, and no long queue."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from app.core import intake
from app.core.intake import PROJECT_SEATS, SEATS, WAITING, Intake
from app.core.keys import KEYLESS, Caller
from app.dataset_errors import IntakeFull
from tests.rig import wait_for


@pytest.fixture
def taken() -> Iterator[ExitStack]:
    """Seats that are held until the test ends."""
    with ExitStack() as taken:
        yield taken


def of(project_id: str) -> Caller:
    return Caller(project_id=project_id, scope="write", key_id="key")


def test_one_project_leaves_seats_to_the_others(taken: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "WAIT_S", 0.0)
    seats = Intake()
    for _ in range(PROJECT_SEATS):
        taken.enter_context(seats.seat(of("prj_a")))

    with pytest.raises(IntakeFull):
        taken.enter_context(seats.seat(of("prj_a")))
    for _ in range(SEATS - PROJECT_SEATS):
        taken.enter_context(seats.seat(of("prj_b")))
    with pytest.raises(IntakeFull):
        taken.enter_context(seats.seat(of("prj_b")))


def test_who_comes_while_all_seats_are_taken_waits_for_one_and_whoever_comes_after_many_does_not(
    taken: ExitStack,
) -> None:
    seats = Intake()
    for _ in range(SEATS):
        taken.enter_context(seats.seat(KEYLESS))

    def sit() -> bool:
        with seats.seat(KEYLESS):
            return True

    with ThreadPoolExecutor(WAITING) as pool:
        waiting = [pool.submit(sit) for _ in range(WAITING)]
        wait_for(lambda: seats._waiting == WAITING, "the queue")
        with pytest.raises(IntakeFull):
            sit()
        taken.close()

        assert all(one.result() for one in waiting)
    assert sit()
