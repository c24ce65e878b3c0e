"""The wire of who may: API keys, as JSON asks for them and shows them. Shapes and types only, as app.schemas."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from app.schemas import Body, Text, View

Scope = Literal["read", "write", "admin"]


class KeyBody(Body):
    """What `POST /keys` takes."""

    scope: Scope = Field(description="`write` includes `read`, and `admin` both.")
    name: Annotated[Text, Field(max_length=200)] = Field(default="", description="A name of your own.")
    expires_days: Annotated[float, Field(gt=0, le=3650)] | None = Field(
        default=None, description="Days until it opens nothing any more; absent = until it is revoked."
    )


class KeyView(View):
    """An API key, without what would open anything."""

    id: str
    project: str = Field(description="Name of the project whose data it opens.")
    name: str
    scope: Scope
    state: Literal["active", "expired", "revoked"]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None = Field(description="When it was last used, to the minute.")


class NewKeyView(KeyView):
    """A key that was just made."""

    key: str = Field(description="Shown here, and never again.")
