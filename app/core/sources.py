"""Data by reference: fetch the file that a source names, and say where it came from. What may be asked, app.core.egress says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from app.core.egress import Egress
from app.dataset_errors import SourceInvalid

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


def fetch_source(egress: Egress, source: Mapping[str, str], to: Path) -> SourceFile:
    """Fetch what a source names into the file `to`. Raises SourceInvalid, and what `Egress.fetch` raises."""
    if source["type"] == "hf":
        return fetch_hub(egress, source["repo"], source["path"], source["revision"], to)
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _name(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2][:200]
