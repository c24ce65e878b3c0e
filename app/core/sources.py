"""Data by reference: fetch the file that a source names, and say where it came from. What may be asked, app.core.egress says."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from app.blobs import stream_object
from app.core.egress import Egress
from app.core.hub import find_files
from app.dataset_errors import EgressOff, SourceFailed, SourceInvalid, SourceRefused
from app.settings import Settings
from p2d.errors import DatasetTooLarge
from p2d.validation import DataFile

REPOSITORY = "https://huggingface.co/datasets/{repo}/tree/{commit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedFile:
    """One of several files that make a dataset."""

    path: str
    """In its repository."""
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where the bytes of a dataset came from; kept in its report."""

    type: str
    url: str
    """Without its query."""
    sha256: str
    """Of all bytes; of several files, one after the other."""
    size_bytes: int
    fetched_at: str
    revision: str | None = None
    """The commit, also where a branch was named."""
    config: str | None = None
    split: str | None = None
    files: tuple[FetchedFile, ...] = ()
    """Where config and split named them: in the order in which their rows stand in the dataset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceData:
    """Fetched files that make one dataset."""

    files: tuple[DataFile, ...]
    name: str
    """A label for it."""
    provenance: Provenance


def fetch_source(settings: Settings, egress: Egress, source: Mapping[str, str | None], to: Path) -> SourceData:
    """Fetch what a source names.

    Args:   to: a file to be written; several lie beside it.
    Raises: SourceInvalid, StoreUnavailable, and what `Egress.fetch` raises.
    """
    if source["type"] == "hf":
        return fetch_hub(egress, source, to)
    url = source["url"] or ""
    return fetch_object(settings, url, to) if source["type"] == "s3" else fetch_https(egress, url, to)


def fetch_https(egress: Egress, url: str, to: Path) -> SourceData:
    """Fetch a URL. Raises what `Egress.fetch` raises."""
    found = egress.fetch(url, to)
    provenance = Provenance(
        type="https", url=found.url, sha256=found.sha256, size_bytes=found.size_bytes, fetched_at=_now()
    )
    return _one(to, _name(url), provenance)


def fetch_hub(egress: Egress, source: Mapping[str, str | None], to: Path) -> SourceData:
    """Fetch files of a dataset repository at a commit. Raises what `app.core.hub.find_files` and `Egress.fetch` raise."""
    until = time.monotonic() + egress.max_s
    found = find_files(egress, source, to)
    files, fetched, whole, left = [], [], hashlib.sha256(), egress.max_bytes
    for number, path in enumerate(found.paths):
        place = to.with_name(f"{to.name}.{number}")
        in_time = max(until - time.monotonic(), 0.001)
        try:
            one = replace(egress, max_bytes=left, max_s=in_time).fetch(found.url(path), place)
        except DatasetTooLarge:
            text = f"The source has more than {egress.max_bytes} bytes."
            raise DatasetTooLarge(text, limit=egress.max_bytes) from None
        left -= one.size_bytes
        with place.open("rb") as file:
            while chunk := file.read(1 << 20):
                whole.update(chunk)
        files.append(DataFile(path=place, name=path))
        fetched.append(FetchedFile(path=path, sha256=one.sha256, size_bytes=one.size_bytes))
    one_file = source["path"] is not None
    provenance = Provenance(
        type="hf",
        url=found.url(found.paths[0]) if one_file else REPOSITORY.format(repo=found.repo, commit=found.commit),
        sha256=whole.hexdigest(),
        size_bytes=sum(one.size_bytes for one in fetched),
        fetched_at=_now(),
        revision=found.commit,
        config=found.config,
        split=found.split,
        files=() if one_file else tuple(fetched),
    )
    name = found.paths[0] if one_file else f"{found.repo} {found.config}/{found.split}"
    return SourceData(files=tuple(files), name=_name(name) if one_file else name[:200], provenance=provenance)


def fetch_object(settings: Settings, url: str, to: Path) -> SourceData:
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
    return _one(to, _name(url), provenance)


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


def _one(path: Path, name: str, provenance: Provenance) -> SourceData:
    return SourceData(files=(DataFile(path=path, name=name),), name=name, provenance=provenance)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _name(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2][:200]
