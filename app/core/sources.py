"""Data by reference: fetch the file that a source names, and say where it came from. What may be asked, app.core.egress says."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from app.blobs import stream_object
from app.core.egress import Egress
from app.dataset_errors import EgressOff, SourceFailed, SourceInvalid, SourceRefused
from app.settings import Settings
from p2d.errors import DatasetTooLarge

HUB = "https://huggingface.co/datasets/{repo}/resolve/{revision}/{path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where the bytes of a dataset came from; kept in its report."""

    type: str
    url: str
    """Without its query."""
    sha256: str
    size_bytes: int
    fetched_at: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A fetched file."""

    path: Path
    name: str
    provenance: Provenance


def fetch_source(settings: Settings, egress: Egress, source: Mapping[str, str], to: Path) -> SourceFile:
    """Fetch what a source names into the file `to`. Raises SourceInvalid, StoreUnavailable, and what `Egress.fetch` raises."""
    if source["type"] == "hf":
        return fetch_hub(egress, source["repo"], source["path"], source["revision"], to)
    if source["type"] == "s3":
        return fetch_object(settings, source["url"], to)
    return fetch_https(egress, source["url"], to)


def fetch_https(egress: Egress, url: str, to: Path) -> SourceFile:
    """Fetch a URL. Raises what `Egress.fetch` raises."""
    found = egress.fetch(url, to)
    provenance = Provenance(
        type="https", url=found.url, sha256=found.sha256, size_bytes=found.size_bytes, fetched_at=_now()
    )
    return SourceFile(path=to, name=_name(url), provenance=provenance)


def fetch_hub(egress: Egress, repo: str, path: str, revision: str, to: Path) -> SourceFile:
    """Fetch one file of a dataset repository at a commit. Raises SourceInvalid, and what `Egress.fetch` raises."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    if not (re.fullmatch(rf"{part}/{part}", repo) and re.fullmatch(rf"{part}(/{part})*", path)) or ".." in path:
        raise SourceInvalid("The repository is `owner/name`; it and the path are made of letters, digits and . _ -")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise SourceInvalid("The revision is a commit of 40 hexadecimal digits: a branch may change.")
    url = HUB.format(repo=repo, revision=revision, path=path)
    found = egress.fetch(url, to)
    provenance = Provenance(
        type="hf",
        url=url,
        sha256=found.sha256,
        size_bytes=found.size_bytes,
        fetched_at=_now(),
        revision=revision,
    )
    return SourceFile(path=to, name=_name(url), provenance=provenance)


def fetch_object(settings: Settings, url: str, to: Path) -> SourceFile:
    """Fetch an object of a bucket that the operator opened, with the service's credentials.

    Raises: EgressOff, SourceInvalid, SourceRefused, SourceFailed, DatasetTooLarge, StoreUnavailable.
    """
    if not settings.source_buckets:
        raise EgressOff()
    parts = urlsplit(url)
    names = parts.path.removeprefix("/").split("/")
    if parts.scheme != "s3" or not parts.netloc or {"", ".", ".."} & set(names) or "?" in url or "#" in url:
        raise SourceInvalid("An object is named s3://bucket/key.")
    bucket, path = _open_bucket(settings, parts.netloc, "/".join(names))
    until, limit = time.monotonic() + settings.fetch_max_s, settings.max_upload_bytes
    digest, size = hashlib.sha256(), 0
    try:
        with to.open("wb") as file:
            for chunk in stream_object(bucket, path):
                size += len(chunk)
                if size > limit:
                    raise DatasetTooLarge(f"The file has more than {limit} bytes.", limit=limit)
                if time.monotonic() > until:
                    raise SourceFailed(f"Fetching took more than {settings.fetch_max_s:g} seconds.")
                digest.update(chunk)
                file.write(chunk)
    except FileNotFoundError:
        raise SourceFailed("There is no such object.") from None
    provenance = Provenance(type="s3", url=url, sha256=digest.hexdigest(), size_bytes=size, fetched_at=_now())
    return SourceFile(path=to, name=_name(url), provenance=provenance)


def _open_bucket(settings: Settings, bucket: str, key: str) -> tuple[str, str]:
    """The open bucket's URL and the key below its prefix. Raises SourceRefused: for the store's own bucket always."""
    store = urlsplit(settings.url("store_url"))
    for url in settings.source_buckets:
        parts = urlsplit(url)
        prefix = parts.path.strip("/")
        if parts.netloc == bucket and (not prefix or key.startswith(prefix + "/")):
            if store.scheme == "s3" and store.netloc == bucket:
                break
            return url, key.removeprefix(prefix + "/") if prefix else key
    raise SourceRefused(f"The bucket {bucket} is not open to datasets, or not there.", bucket=bucket)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _name(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2][:200]
