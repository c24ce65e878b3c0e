"""The wire of webhooks: what is asked, what is shown, and the messages that are sent. Shapes and types only, as app.schemas."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from app.schemas import Body, Text
from app.views import Status, View

Event = Literal[
    "job.queued",
    "job.running",
    "job.pausing",
    "job.paused",
    "job.cancelling",
    "job.cancelled",
    "job.succeeded",
    "job.failed",
]
ENDS: tuple[Event, ...] = ("job.succeeded", "job.failed", "job.cancelled")

Url = Annotated[
    Text,
    Field(
        min_length=8,
        max_length=2000,
        description="An https URL of a public host, or of one that `P2D_WEBHOOK_INSIDE` names. Redirects are not followed.",
    ),
]
Events = Annotated[
    list[Event], Field(min_length=1, max_length=8, description="The statuses of jobs that it is told of.")
]
Heard = Annotated[
    Literal["all", "named"],
    Field(description="Of which jobs it is told: `all` of the project, or those that name it in their `webhooks`."),
]
Description = Annotated[Text, Field(max_length=500)]


class WebhookBody(Body):
    """What `POST /webhooks` takes."""

    url: Url
    events: Events = Field(default=list(ENDS))
    jobs: Heard = "all"
    description: Description = Field(default="", description="A text of your own.")
    enabled: bool = Field(default=True, description="What happens while it is disabled is not told later.")


class WebhookPatch(Body):
    """What `PATCH /webhooks/{id}` takes, as a JSON merge patch: only what is to change."""

    url: Url = Field(default_factory=str)
    events: Events = Field(default_factory=list)
    jobs: Heard = Field(default_factory=lambda: "all")
    description: Description | None = Field(default=None, description="null empties it.")
    enabled: bool = Field(default_factory=bool, description="What waits to be sent goes on once it is enabled again.")


class WebhookView(View):
    """A webhook, without its secret."""

    id: str
    url: str
    events: list[str]
    jobs: Literal["all", "named"] = Field(description="`named`: only of jobs whose `webhooks` name it.")
    description: str
    enabled: bool
    disabled_reason: Literal["gone", "failing"] | None = Field(
        description="Why the service disabled it: its receiver answered 410, or nothing was delivered for days."
    )
    failing_since: datetime | None = Field(description="Of the first failed try since the last that succeeded.")
    secret_version: int = Field(description="One more with each rotation.")
    rotated_at: datetime | None
    created_at: datetime


class NewSecretView(WebhookView):
    """A webhook with the secret that was just made."""

    secret: str = Field(description="`whsec_...`; shown here, and never again.")


class JobNewsView(View):
    """What a message tells of a job; `GET /jobs/{id}` has all of it."""

    id: str
    kind: str
    name: str
    status: Status
    metadata: dict[str, str]
    error: dict[str, JsonValue] | None = Field(
        default=None, description="Of a job that failed: `code`, `fault`, `retryable`, `detail` and `hint`."
    )


class MessageView(View):
    """The body that is sent, signed by the convention of Standard Webhooks."""

    type: str = Field(description="An event such as `job.succeeded`, or `webhook.test`; types may grow.")
    timestamp: datetime = Field(description="When it happened.")
    data: JobNewsView = Field(description="Of `webhook.test` only `webhook_id`.")


class DeliveryView(View):
    """One event on its way to one webhook."""

    id: str = Field(description="Also the `webhook-id` of the message, at every try.")
    webhook_id: str
    job_id: str | None
    type: str
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    next_try_at: datetime | None = Field(description="While it is pending.")
    tried_at: datetime | None
    response_status: int | None = Field(description="Of the last answer, if there was one.")
    error: str | None = Field(description="Why the last try failed.")
    payload: dict[str, JsonValue] = Field(description="The message.")
    created_at: datetime
    finished_at: datetime | None
