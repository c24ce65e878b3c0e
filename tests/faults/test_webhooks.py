"""Whatever happens to jobs and workers, a webhook is told what happened: nothing else, nothing less, under one id each."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import SecretStr

from app.core import moves
from app.core.keys import open_pepper
from app.core.webhook_secrets import mark_of, secret_of
from app.core.webhooks import EVENTS, Sent, make_webhook, redeliver, send_test, settle
from app.db.deliveries import Delivery, claim_delivery, list_deliveries
from app.db.engine import for_project
from app.db.jobs import FINAL
from app.db.projects import DEFAULT_PROJECT, open_project
from app.db.webhooks import Webhook, delete_webhook, get_webhook
from tests.receiver import Receiver, receiving
from tests.rig import Rig, wait_for

ENDS = [f"job.{status}" for status in sorted(FINAL)]


@pytest.fixture
def receiver(rig: Rig) -> Iterator[Receiver]:
    """A receiver that the rig's workers may send to; they try again at once, and give up a try soon."""
    with receiving() as receiver:
        more = {"webhook_retry_s": (0.1,) * 5, "webhook_timeout_s": 1.0, "key_pepper": SecretStr("p" * 32)}
        rig.settings = rig.settings.model_copy(update={"webhook_inside": (receiver.host,), **more})
        yield receiver
    with rig.db.begin() as conn:
        conn.exec_driver_sql("delete from webhooks")


def hook(rig: Rig, receiver: Receiver, *events: str, project: str = DEFAULT_PROJECT, path: str = "/hook") -> Webhook:
    """A webhook of a project."""
    with for_project(rig.db, project).begin() as conn:
        return make_webhook(
            conn,
            rig.settings,
            url=receiver.url(path),
            events=events or EVENTS,
            jobs="all",
            description="",
            enabled=True,
        )


def pepper(rig: Rig) -> bytes:
    return open_pepper(rig.settings, in_use=True)


def outbox(rig: Rig, webhook: Webhook) -> list[Delivery]:
    """All deliveries of a webhook, oldest first."""
    with rig.db.connect() as conn:
        return list(reversed(list_deliveries(conn, webhook.id, limit=1000)))


def all_delivered(rig: Rig, webhook: Webhook) -> list[Delivery]:
    """Wait until nothing is pending."""
    wait_for(lambda: {one.status for one in outbox(rig, webhook)} == {"delivered"}, "all deliveries")
    return outbox(rig, webhook)


def take(rig: Rig, lease_s: float = 60.0) -> Delivery | None:
    with rig.db.begin() as conn:
        return claim_delivery(conn, pepper_mark=mark_of(pepper(rig)), lease_s=lease_s)


# --- with the change ------------------------------------------------------------------------------------------------------


def test_every_status_of_a_job_is_told_in_the_transaction_that_gives_it(rig: Rig, receiver: Receiver) -> None:
    webhook = hook(rig, receiver)
    rig.steer("hold", "train")
    job_id = rig.submit()
    with rig.in_process():
        rig.reached("train")
        rig.pause(job_id)
        rig.paused(job_id)
        rig.let_go("train")
        rig.resume(job_id)
        assert rig.ended(job_id).status == "succeeded"
        deliveries = all_delivered(rig, webhook)

    path = [f"job.{event.data['status']}" for event in rig.events(job_id) if event.type == "job.status"]
    assert [one.type for one in deliveries] == path
    assert sorted(message.id for message in receiver.got()) == sorted(one.id for one in deliveries)
    rig.check(job_id)


def test_a_change_that_is_rolled_back_is_not_told(rig: Rig, receiver: Receiver) -> None:
    webhook = hook(rig, receiver)
    job_id = rig.submit()
    before = outbox(rig, webhook)

    with rig.db.connect() as conn:
        assert moves.request_cancel(conn, job_id).status == "cancelled"
        assert len(list_deliveries(conn, webhook.id, limit=10)) == len(before) + 1
        conn.rollback()

    assert rig.job(job_id).status == "queued"
    assert outbox(rig, webhook) == before


def test_a_failed_job_tells_its_error_without_anything_of_its_rows(rig: Rig, receiver: Receiver) -> None:
    webhook = hook(rig, receiver, "job.failed")
    rig.steer("fail", "train", "user")
    job_id = rig.submit()
    with rig.in_process():
        error = rig.ended(job_id).error
        all_delivered(rig, webhook)

    (message,) = receiver.got()
    told = message.verified(secret_of(pepper(rig), webhook.id, 1))["data"]["error"]
    assert error is not None
    assert told == {name: error[name] for name in ("code", "fault", "retryable", "detail", "hint")}
    assert b"What is" not in message.body


def test_a_job_is_told_to_its_own_project_alone(rig: Rig, receiver: Receiver) -> None:
    with rig.db.begin() as conn:
        lab = open_project(conn, "lab")
    mine, other = (hook(rig, receiver, project=project, path=f"/{project}") for project in (lab, DEFAULT_PROJECT))
    job_id = rig.submit(project=lab)
    with rig.in_process():
        rig.ended(job_id)
        all_delivered(rig, mine)

    assert {message.content["data"]["id"] for message in receiver.got(f"/{lab}")} == {job_id}
    assert (outbox(rig, other), receiver.got(f"/{DEFAULT_PROJECT}")) == ([], [])


# --- once, if nobody dies -------------------------------------------------------------------------------------------------


def test_two_workers_send_each_message_once(rig: Rig, receiver: Receiver) -> None:
    webhooks = [hook(rig, receiver, *ENDS, path=f"/{number}") for number in range(4)]
    jobs = [rig.submit(kind="identify_heads") for _ in range(6)]
    with rig.in_process(2):
        for job_id in jobs:
            rig.ended(job_id)
        for webhook in webhooks:
            all_delivered(rig, webhook)

    for number, webhook in enumerate(webhooks):
        ids = [message.id for message in receiver.got(f"/{number}")]
        assert sorted(ids) == sorted({one.id for one in outbox(rig, webhook)})
        assert len(ids) == len(jobs)


def test_eight_hands_at_once_take_each_delivery_once(rig: Rig, receiver: Receiver) -> None:
    webhooks = [hook(rig, receiver, path=f"/{number}") for number in range(5)]
    with rig.db.begin() as conn:
        for webhook in webhooks * 8:
            send_test(conn, webhook.id)
    taken: list[str] = []

    def work(_: int) -> None:
        while len(taken) < 40:
            if (delivery := take(rig)) is not None:
                taken.append(delivery.id)
                with rig.db.begin() as conn:
                    settle(conn, rig.settings, delivery, Sent(status=200))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))

    assert len(set(taken)) == len(taken) == 40
    assert all(one.status == "delivered" for webhook in webhooks for one in outbox(rig, webhook))


def test_a_receiver_that_hangs_holds_up_nobody_else(rig: Rig, receiver: Receiver) -> None:
    rig.settings = rig.settings.model_copy(update={"webhook_timeout_s": 30.0})
    receiver.open.clear()
    with receiving() as quick:
        hosts = (receiver.host, quick.host)
        rig.settings = rig.settings.model_copy(update={"webhook_inside": hosts, "webhook_hands": 2})
        hanging, well = hook(rig, receiver, *ENDS), hook(rig, quick, *ENDS)
        with rig.db.begin() as conn:
            for _ in range(5):
                send_test(conn, hanging.id)
        job_id = rig.submit(kind="identify_heads")
        with rig.in_process():
            wait_for(receiver.got, "the receiver that hangs")
            rig.ended(job_id)
            all_delivered(rig, well)
            assert len(receiver.got()) == 1
            receiver.open.set()
            all_delivered(rig, hanging)


# --- and never less than that ---------------------------------------------------------------------------------------------


def test_a_message_whose_worker_was_killed_while_sending_comes_again(rig: Rig, receiver: Receiver) -> None:
    rig.settings = rig.settings.model_copy(update={"lease_s": 1.5, "webhook_timeout_s": 1.5})
    webhook = hook(rig, receiver)
    with rig.db.begin() as conn:
        send_test(conn, webhook.id)
    receiver.open.clear()
    worker = rig.worker()
    wait_for(receiver.got, "the message")
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    receiver.open.set()

    with rig.in_process():
        (delivery,) = all_delivered(rig, webhook)

    assert delivery.attempts >= 2
    assert {message.id for message in receiver.got()} == {delivery.id}
    assert len({message.body for message in receiver.got()}) == 1


def test_a_try_that_comes_back_too_late_changes_nothing(rig: Rig, receiver: Receiver) -> None:
    webhook = hook(rig, receiver)
    with rig.db.begin() as conn:
        send_test(conn, webhook.id)
    late = take(rig, lease_s=0.0)
    again = wait_for(lambda: take(rig), "the lease to run out")
    assert late is not None
    assert again is not None
    assert (again.id, again.token) == (late.id, late.token + 1)
    assert take(rig) is None

    with rig.db.begin() as conn:
        settle(conn, rig.settings, late, Sent(status=410))
        settle(conn, rig.settings, again, Sent(status=200))
        settle(conn, rig.settings, late, Sent(error="too late"))

    (delivery,) = outbox(rig, webhook)
    assert (delivery.status, delivery.response_status, delivery.error) == ("delivered", 200, None)
    with rig.db.connect() as conn:
        now = get_webhook(conn, webhook.id)
    assert now is not None
    assert now.enabled


def test_a_delivery_that_is_being_sent_may_be_asked_for_again(rig: Rig, receiver: Receiver) -> None:
    webhook = hook(rig, receiver)
    with rig.db.begin() as conn:
        made = send_test(conn, webhook.id)
    sending = take(rig)
    assert sending is not None
    with rig.db.begin() as conn:
        redeliver(conn, webhook.id, made.id)

    assert take(rig) is None  # not twice at the same time
    with rig.db.begin() as conn:
        settle(conn, rig.settings.model_copy(update={"webhook_retry_s": ()}), sending, Sent(status=500))
    assert outbox(rig, webhook)[0].status == "pending"  # though that was its last try
    again = take(rig)
    assert again is not None
    with rig.db.begin() as conn:
        settle(conn, rig.settings, again, Sent(status=200))
    assert outbox(rig, webhook)[0].status == "delivered"


def test_a_job_ends_while_its_webhook_is_being_deleted(rig: Rig, receiver: Receiver) -> None:
    webhook = hook(rig, receiver)
    jobs = [rig.submit(kind="identify_heads") for _ in range(2)]
    with rig.db.connect() as deleting:
        delete_webhook(deleting, webhook.id)
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(rig.cancel, jobs[0])
            wait_for(lambda: waiting(rig), "the end of the job to wait for the deletion")
            deleting.commit()
            assert ended.result(30).status == "cancelled"

    assert rig.cancel(jobs[1]).status == "cancelled"
    assert outbox(rig, webhook) == []


def waiting(rig: Rig) -> int:
    """Sessions of this database that wait for a lock."""
    query = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    with rig.db.connect() as conn:
        return int(conn.exec_driver_sql(query).scalar_one())
