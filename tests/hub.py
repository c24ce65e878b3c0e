"""What the Hugging Face Hub's API says of a dataset repository, for servers of tests."""

from __future__ import annotations

from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def repository(names: list[str], *, sha: str = COMMIT, configs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The answer, with some of the fields that nobody here reads."""
    return {
        "_id": "621ffdd236468d709f181d58",
        "id": "owner/sums",
        "author": "owner",
        "sha": sha,
        "private": False,
        "gated": False,
        "tags": ["license:mit"],
        "downloads": 12,
        "likes": 1,
        "cardData": {"license": "mit", **({"configs": configs} if configs else {})},
        "siblings": [{"rfilename": name} for name in names],
    }
