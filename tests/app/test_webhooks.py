"""Laws of webhooks: told once what was asked for, signed so that a stranger's library believes it, tried until it arrives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from standardwebhooks import WebhookVerificationError

from app.core.keys import open_pepper
from app.core.webhook_secrets import signed_headers
from app.core.webhooks import secrets_of
from app.db.deliveries import forget_deliveries
from app.db.webhooks import find_webhook
from app.service import environment
from app.settings import Settings
from tests.app.conftest import Api, serving
from tests.app.test_metrics import scrape
from tests.receiver import Message, Receiver, receiving
from tests.rig import wait_for
from tests.s3_server import free_ports
from workers.loop import Worker

RETRIES = (0.05, 0.05, 0.05)
TOO_MUCH = 5


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def nobody() -> str:
    """A host and port inside where nobody listens yet."""
    return f"127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture(scope="module")
def api(module_settings: Settings, receiver: Receiver, nobody: str) -> Iterator[Api]:
    """A service that may send to the receiver, and tries again at once."""
    more = {
        "webhook_inside": (receiver.host, nobody),
        "webhook_retry_s": RETRIES,
        "webhook_timeout_s": 5.0,
        "quota_webhooks": TOO_MUCH,
    }
    with serving(module_settings.model_copy(update=more)) as api:
        yield api


@contextmanager
def working(api: Api, **more: Any) -> Iterator[None]:
    """A worker, while the block runs."""
    worker = Worker(api.settings.model_copy(update=more))
    worker.start()
    try:
        yield
    finally:
        worker.stop()
        assert worker.join(30)


@dataclass(frozen=True, slots=True)
class Hook:
    """One webhook of a test, and what its receiver got."""

    api: Api
    receiver: Receiver
    id: str
    secret: str
    path: str

    def ask(self, method: str, path: str = "", **more: Any) -> httpx.Response:
        """A request about it."""
        return self.api.http.request(method, f"/webhooks/{self.id}{path}", **more)

    def view(self) -> dict[str, Any]:
        """As the API shows it."""
        return dict(self.ask("GET").json())

    def deliveries(self, **query: str) -> list[dict[str, Any]]:
        """All its deliveries, newest first, page by page."""
        found: list[dict[str, Any]] = []
        page: dict[str, Any] = {"has_more": True, "next_cursor": None}
        while page["has_more"]:
            more = {"cursor": page["next_cursor"]} if page["next_cursor"] else {}
            page = self.ask("GET", "/deliveries", params={"limit": "2", **query, **more}).json()
            found += page["data"]
        return found

    def settled(self, count: int = 1) -> list[dict[str, Any]]:
        """Its deliveries, once there are so many and all have ended."""

        def ended() -> list[dict[str, Any]]:
            found = self.deliveries()
            return found if len(found) == count and all(one["status"] != "pending" for one in found) else []

        return wait_for(ended, f"{count} deliveries")

    def got(self) -> list[Message]:
        """What its receiver got."""
        return self.receiver.got(self.path)


@pytest.fixture
def hook(api: Api, receiver: Receiver, request: pytest.FixtureRequest) -> Iterator[Hook]:
    """A webhook of this test alone."""
    with hooked(api, receiver, request.node.name) as hook:
        yield hook


@contextmanager
def hooked(api: Api, receiver: Receiver, name: str, **fields: Any) -> Iterator[Hook]:
    """A webhook, while the block runs."""
    path = "/" + "".join(char for char in name if char.isalnum())
    answer = api.http.post("/webhooks", json={"url": receiver.url(path), **fields})
    assert answer.status_code == 201, answer.text
    body = answer.json()
    try:
        yield Hook(api, receiver, body["id"], body["secret"], path)
    finally:
        api.http.delete(f"/webhooks/{body['id']}")
        receiver.answers.clear()


# --- what is told ---------------------------------------------------------------------------------------------------------


def test_the_end_of_a_job_is_told_signed_and_without_anything_of_its_rows(api: Api, hook: Hook) -> None:
    job_id = api.job(name="näch", metadata={"run": "7"})

    api.finish(job_id)
    with working(api):
        (delivery,) = hook.settled()

    (message,) = hook.got()
    told = message.verified(hook.secret)
    assert told["type"] == "job.succeeded"
    assert told["data"] == {
        "id": job_id,
        "kind": "adapt",
        "name": "näch",
        "status": "succeeded",
        "metadata": {"run": "7"},
    }
    assert (message.headers["content-type"], message.id) == ("application/json", delivery["id"])
    assert delivery["payload"] == told
    assert (delivery["status"], delivery["response_status"], delivery["attempts"], delivery["error"]) == (
        *("delivered", 200, 1),
        None,
    )
    assert (delivery["job_id"], delivery["next_try_at"]) == (job_id, None)
    assert told["timestamp"][:19] == api.http.get(f"/jobs/{job_id}").json()["finished_at"][:19]


def test_a_message_that_was_changed_or_signed_by_another_is_not_believed(api: Api, hook: Hook) -> None:
    with working(api):
        assert hook.ask("POST", "/test").status_code == 202
        hook.settled()

    (message,) = hook.got()
    assert message.verified(hook.secret)["data"] == {"webhook_id": hook.id}
    changed = Message(message.path, message.headers, message.body.replace(b"webhook.test", b"job.succeeded"))
    late = Message(message.path, dict(signed_headers(message.id, message.body, [hook.secret], at_s=1)), message.body)
    for forged, secret in ((changed, hook.secret), (late, hook.secret), (message, "whsec_" + 43 * "A" + "=")):
        with pytest.raises(WebhookVerificationError):
            forged.verified(secret)


def test_only_what_was_asked_for_is_told(api: Api, receiver: Receiver) -> None:
    with hooked(api, receiver, "asked", events=["job.paused", "job.cancelled"]) as hook:
        job_id = api.job()
        for move in ("pause", "resume", "cancel"):
            assert api.http.post(f"/jobs/{job_id}/{move}").status_code == 202

        with working(api):
            hook.settled(2)

        assert {message.content["type"] for message in hook.got()} == {"job.paused", "job.cancelled"}


def test_what_happens_while_it_is_disabled_is_not_told_and_what_waits_goes_on_later(api: Api, hook: Hook) -> None:
    assert hook.ask("POST", "/test").status_code == 202
    assert hook.ask("PATCH", json={"enabled": False}).json()["enabled"] is False
    api.http.post(f"/jobs/{api.job()}/cancel")
    refusal = hook.ask("POST", "/test")
    assert (refusal.status_code, refusal.json()["code"]) == (409, "webhook.disabled")
    with working(api):
        api.finish(api.job(kind="identify_heads"))
        assert [one["status"] for one in hook.deliveries()] == ["pending"]
        assert hook.got() == []

        hook.ask("PATCH", json={"enabled": True})
        hook.settled()

    assert [message.content["type"] for message in hook.got()] == ["webhook.test"]


# --- the secret -----------------------------------------------------------------------------------------------------------


def test_a_secret_is_told_once_and_kept_nowhere(api: Api, receiver: Receiver) -> None:
    body, headers = {"url": receiver.url("/once?token=x")}, {"Idempotency-Key": "a-key"}
    made = api.http.post("/webhooks", json=body, headers=headers)
    again = api.http.post("/webhooks", json=body, headers=headers)
    webhook_id, secret = made.json()["id"], made.json()["secret"]

    assert (again.status_code, again.json(), again.headers["idempotency-replayed"]) == (201, made.json(), "true")
    assert secret.startswith("whsec_")
    other = api.http.post("/webhooks", json={"url": receiver.url("/another")}, headers=headers)
    assert other.json()["code"] == "idempotency.mismatch"
    rotated = [api.http.post(f"/webhooks/{webhook_id}/rotate", headers=headers) for _ in range(2)]
    assert rotated[0].json() == rotated[1].json()
    assert (rotated[0].json()["secret_version"], rotated[0].json()["secret"] == secret) == (2, False)
    said = api.http.get("/webhooks").text + api.http.get(f"/webhooks/{webhook_id}").text + api.http.get("/audit").text
    assert "token=x" not in api.http.get("/audit").text
    with api.engine.connect() as conn:
        for table in ("webhooks", "webhook_deliveries", "idempotency_keys", "audit"):
            said += str(conn.exec_driver_sql(f"select to_jsonb(t)::text from {table} t").all())
    for text in (secret, rotated[0].json()["secret"]):
        assert text not in said
        assert text.removeprefix("whsec_") not in said
    api.http.delete(f"/webhooks/{webhook_id}")


def test_after_a_rotation_both_secrets_sign_for_a_while_and_then_the_new_one_alone(api: Api, hook: Hook) -> None:
    new = hook.ask("POST", "/rotate").json()["secret"]
    with working(api):
        hook.ask("POST", "/test")
        hook.settled(1)
        with api.engine.begin() as conn:
            conn.exec_driver_sql("update webhooks set rotated_at = now() - interval '25 hours'")
        hook.ask("POST", "/test")
        hook.settled(2)

    first, second = hook.got()
    assert first.verified(new) == first.verified(hook.secret)
    assert len(first.headers["webhook-signature"].split()) == 2
    assert second.verified(new)
    with pytest.raises(WebhookVerificationError):
        second.verified(hook.secret)


def test_of_three_secrets_two_sign(api: Api, hook: Hook) -> None:
    second, third = (hook.ask("POST", "/rotate").json()["secret"] for _ in range(2))

    with api.engine.connect() as conn:
        webhook = find_webhook(conn, hook.id)
    assert secrets_of(webhook, open_pepper(api.settings, in_use=True), old_secret_h=24) == [third, second]


def test_a_worker_with_another_pepper_sends_nothing(api: Api, hook: Hook) -> None:
    hook.ask("POST", "/test")
    job_id = api.job(kind="identify_heads")
    with working(api, key_pepper=SecretStr("x" * 32)):
        wait_for(lambda: api.http.get(f"/jobs/{job_id}").json()["status"] == "succeeded", "the end of the job")
        assert {one["attempts"] for one in hook.deliveries()} == {0}
    with working(api):
        hook.settled(2)


# --- tried again ----------------------------------------------------------------------------------------------------------


def test_a_message_is_tried_again_until_it_is_taken_and_stays_the_same(api: Api, hook: Hook) -> None:
    hook.receiver.answers += [500, 302, 429]
    with working(api):
        hook.ask("POST", "/test")
        (delivery,) = hook.settled()

    assert (delivery["status"], delivery["attempts"], delivery["response_status"]) == ("delivered", 4, 200)
    assert len({(message.id, message.body) for message in hook.got()}) == 1
    assert len(hook.got()) == 4
    assert hook.receiver.got("/elsewhere") == []  # a redirect is not followed
    assert hook.view()["failing_since"] is None


def test_a_receiver_that_comes_later_gets_it_all_the_same(api: Api, receiver: Receiver, nobody: str) -> None:
    with hooked(api, receiver, "x") as hook, working(api, webhook_retry_s=(0.05,) * 50):
        hook.ask("PATCH", json={"url": f"http://{nobody}/later"})
        hook.ask("POST", "/test")
        # Not while the next try is under way, whose time is behind that for which it was planned.
        failed = wait_for(lambda: [one for one in hook.deliveries() if one["error"] and _rests(one)], "a failed try")[0]
        assert (failed["status"], failed["response_status"]) == ("pending", None)
        assert "ConnectionRefusedError" in failed["error"]
        assert hook.view()["failing_since"] is not None

        with receiving(int(nobody.rpartition(":")[2])) as late:
            hook.settled()
            assert len(late.got("/later")) == 1


def _rests(delivery: dict[str, Any]) -> bool:
    return bool(delivery["next_try_at"] > delivery["tried_at"])


def test_after_its_last_try_a_delivery_has_failed_and_may_be_sent_again(api: Api, hook: Hook) -> None:
    hook.receiver.answers += [503] * (len(RETRIES) + 1)
    with working(api):
        hook.ask("POST", "/test")
        (failed,) = hook.settled()
        assert (failed["status"], failed["attempts"]) == ("failed", len(RETRIES) + 1)
        assert failed["error"] == "The receiver answered with 503."
        assert hook.view()["enabled"] is True

        path, headers = f"/deliveries/{failed['id']}/redeliver", {"Idempotency-Key": "again"}
        answers = [hook.ask("POST", path, headers=headers) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [202, 202]
        assert answers[0].json() == answers[1].json()
        (delivered,) = hook.settled()

    assert (delivered["status"], delivered["attempts"], delivered["error"]) == ("delivered", len(RETRIES) + 2, None)
    assert {message.id for message in hook.got()} == {failed["id"]}
    assert hook.ask("POST", "/deliveries/whd_00000000000000000000000000/redeliver").status_code == 404


def test_a_receiver_that_is_gone_is_sent_nothing_more(api: Api, hook: Hook) -> None:
    hook.receiver.answers += [410]
    for _ in range(2):
        hook.ask("POST", "/test")
    with working(api):
        deliveries = hook.settled(2)

    assert [one["status"] for one in deliveries] == ["failed", "failed"]
    errors = {"The webhook was disabled.", "The receiver answered with 410."}
    assert {one["error"] for one in deliveries} == errors
    assert len(hook.got()) == 1
    assert (hook.view()["enabled"], hook.view()["disabled_reason"]) == (False, "gone")
    told = api.http.get("/audit", params={"object": hook.id}).json()["data"][0]
    assert (told["action"], told["actor"], told["facts"]) == ("webhook.disable", "service", {"reason": "gone"})
    enabled = hook.ask("PATCH", json={"enabled": True}).json()
    assert (enabled["enabled"], enabled["disabled_reason"]) == (True, None)


def test_a_receiver_that_fails_for_days_is_disabled(api: Api, hook: Hook) -> None:
    hook.receiver.answers += [500]
    with working(api, webhook_retry_s=(3600.0,)):
        hook.ask("POST", "/test")
        wait_for(lambda: hook.view()["failing_since"], "the first failure")
        with api.engine.begin() as conn:
            conn.exec_driver_sql("update webhooks set failing_since = now() - interval '6 days'")
        hook.receiver.answers += [500]
        hook.ask("POST", "/test")
        hook.settled(2)

    assert hook.view()["disabled_reason"] == "failing"
    assert {one["error"] for one in hook.deliveries()} == {"The receiver answered with 500."}


# --- who and where --------------------------------------------------------------------------------------------------------

REFUSED = [
    *(
        "http://hooks.example/x",
        "https://hooks.example:8443/x",
        "ftp://hooks.example/x",
        "https://user:pw@hooks.example/",
    ),
    *("https://127.0.0.1/x", "https://[::1]/x", "https://169.254.169.254/latest", "https://2130706433/", "https://0/"),
    *("https://localhost/x", "https://metadata.google.internal/x", "https://printer.local/x", "http://127.0.0.1:1/x"),
    *(
        "http://localhost:{port}/x",
        "http://127.0.0.1.:{port}/x",
        "http://2130706433:{port}/x",
        "http://[::ffff:127.0.0.1]:{port}/",
    ),
    *("https://hooks.example/a b", "https://hooks.example\\@127.0.0.1:{port}/", "nonsense", "https://x"),
]


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_is_not_public_or_not_named_is_refused(api: Api, hook: Hook, url: str) -> None:
    url = url.replace("{port}", str(hook.receiver.port))

    for answer in (api.http.post("/webhooks", json={"url": url}), hook.ask("PATCH", json={"url": url})):
        assert (answer.status_code, answer.json()["code"]) == (422, "webhook.refused"), url
        assert answer.json()["errors"][0]["pointer"] == "/url"
        assert "P2D_WEBHOOK_INSIDE" in answer.json()["hint"]


def test_the_operator_may_allow_some_hosts_alone(module_settings: Settings) -> None:
    with serving(module_settings.model_copy(update={"webhook_hosts": ("*.hooks.example",)})) as api:
        answers = [
            api.http.post("/webhooks", json={"url": f"https://{host}/x"})
            for host in ("a.hooks.example", "hooks.example", "elsewhere.example")
        ]
        api.http.delete(f"/webhooks/{answers[0].json()['id']}")
    assert [answer.status_code for answer in answers] == [201, 422, 422]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/url"),
        ({"url": 7}, "/url"),
        ({"events": []}, "/events"),
        ({"events": ["job.exploded"]}, "/events/0"),
        ({"enabled": "yes"}, "/enabled"),
        ({"secret": "whsec_x"}, "/secret"),
    ],
)
def test_a_wrong_request_is_refused(api: Api, body: dict[str, Any], pointer: str) -> None:
    url = {} if pointer == "/url" else {"url": "https://hooks.example/x"}

    answer = api.http.post("/webhooks", json={**url, **body})

    assert answer.status_code == 422
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]


def test_a_project_has_so_many_webhooks_and_no_more(api: Api, hook: Hook, receiver: Receiver) -> None:
    more = []
    for number in range(TOO_MUCH):
        answer = api.http.post("/webhooks", json={"url": receiver.url(f"/{number}")})
        if answer.status_code != 201:
            break
        more.append(answer.json()["id"])

    assert (answer.status_code, answer.json()["code"]) == (429, "limit.webhooks")
    usage = api.http.get("/usage").json()
    assert (usage["webhooks"], usage["webhooks_quota"]) == (TOO_MUCH, TOO_MUCH)
    listed = [one["id"] for one in api.http.get("/webhooks").json()["data"]]
    assert set(listed) >= {hook.id, *more}
    assert [api.http.delete(f"/webhooks/{id}").status_code for id in more] == [204] * len(more)
    assert api.http.get(f"/webhooks/{more[0]}").json()["code"] == "webhook.not_found"


# --- around it ------------------------------------------------------------------------------------------------------------


def test_tries_and_deliveries_are_counted(api: Api, hook: Hook) -> None:
    def tries(outcome: str) -> float:
        return scrape(api).get(("p2d_webhook_tries_total", (("outcome", outcome),)), 0.0)

    before = tries("delivered"), tries("refused")
    hook.receiver.answers += [500]
    with working(api):
        hook.ask("POST", "/test")
        hook.settled()

    assert (tries("delivered") - before[0], tries("refused") - before[1]) == (1, 1)
    assert scrape(api)["p2d_webhook_deliveries", (("status", "delivered"),)] >= 1


def test_old_deliveries_and_those_of_deleted_jobs_are_forgotten(api: Api, hook: Hook) -> None:
    job_id = api.job()
    api.http.post(f"/jobs/{job_id}/cancel")
    with working(api):
        for _ in range(2):
            hook.ask("POST", "/test")
        newest, old, of_job = hook.settled(3)
    with api.engine.begin() as conn:
        conn.exec_driver_sql(
            "update webhook_deliveries set finished_at = now() - interval '31 days' where id = %s", (old["id"],)
        )
        forget_deliveries(conn, kept_d=30)
    assert [one["id"] for one in hook.deliveries()] == [newest["id"], of_job["id"]]
    assert [one["id"] for one in hook.deliveries(status="delivered")] == [newest["id"], of_job["id"]]

    assert api.http.delete(f"/jobs/{job_id}").status_code == 200
    with api.engine.begin() as conn:
        forget_deliveries(conn, kept_d=30)
    assert [one["id"] for one in hook.deliveries()] == [newest["id"]]


def test_what_is_done_to_a_webhook_is_in_the_audit_log(api: Api, receiver: Receiver) -> None:
    with hooked(api, receiver, "audited") as hook:
        hook.ask("PATCH", json={"description": "x"})
        hook.ask("POST", "/rotate")
        hook.ask("POST", "/test")
    told = api.http.get("/audit", params={"object": hook.id}).json()["data"]
    assert [entry["action"] for entry in reversed(told)] == [
        f"webhook.{deed}" for deed in ("create", "update", "rotate", "test", "delete")
    ]


def test_lists_in_settings_reach_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Settings(webhook_inside=("127.0.0.1:9000", "hooks.lan"), webhook_retry_s=(1, 2.5), egress=("data.example",))
    for name, value in environment(given).items():
        monkeypatch.setenv(name, value)

    found = Settings()

    assert (found.webhook_inside, found.webhook_retry_s) == (given.webhook_inside, given.webhook_retry_s)
    assert (found.egress, found.source_buckets) == (("data.example",), ())
