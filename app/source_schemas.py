"""The wire of data by reference: where a file lies that the service is to fetch. Shapes and types only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app.schemas import Body, Mapping, Text


class HttpsSource(Body):
    """A file behind an https URL."""

    type: Literal["https"]
    url: Annotated[Text, Field(min_length=9, max_length=2000)] = Field(
        description="An https URL of a host that `P2D_EGRESS` allows. No credentials."
    )


class S3Source(Body):
    """An object in a bucket that the operator opened."""

    type: Literal["s3"]
    url: Annotated[Text, Field(min_length=6, max_length=1500)] = Field(
        description="`s3://bucket/key`, of a bucket in `P2D_SOURCE_BUCKETS`."
    )


class HubSource(Body):
    """A file of a dataset repository on the Hugging Face Hub, at one commit."""

    type: Literal["hf"]
    repo: Annotated[Text, Field(max_length=200)] = Field(description="`owner/name`.")
    path: Annotated[Text, Field(max_length=500)] = Field(description="The file in the repository.")
    revision: Annotated[Text, Field(max_length=40)] = Field(description="A commit, 40 hexadecimal digits.")


Source = Annotated[HttpsSource | S3Source | HubSource, Field(discriminator="type")]


class DatasetBody(Body):
    """What `POST /datasets` takes as JSON."""

    source: Source
    mapping: Mapping = Field(default={})
