"""Where a dataset lies that a service is to fetch, in one line of text, as the command line and the client take it.

Whether it may be fetched, and what it names exactly, the service decides. No torch here.
"""

from __future__ import annotations

import re

_HUB = re.compile(r"hf:(?P<repo>[^/@:]+(?:/[^/@:]+)?)(?:@(?P<revision>refs/[^/:]+/[^/:]+|[^/:]+))?(?P<rest>[/:].*)?")


def named_source(text: str) -> dict[str, str] | None:
    """The source that the text names, as POST /datasets takes it; None for a text of another form.

    `https://host/file`, `s3://bucket/key`, `hf:owner/name`, and of the last, in this order: `@revision`, then `/config` or
    `/config/split`, or `:path/of/one/file`. A revision with slashes is one of `refs/...`, such as `refs/convert/parquet`.
    """
    for kind in ("https", "s3"):
        if text.startswith(f"{kind}://"):
            return {"type": kind, "url": text}
    if (found := _HUB.fullmatch(text)) is None:
        return None
    source = {"type": "hf", "repo": found["repo"]} | ({"revision": found["revision"]} if found["revision"] else {})
    rest = found["rest"] or ""
    if rest.startswith(":"):
        return {**source, "path": rest[1:]}
    config, _, split = rest.removeprefix("/").partition("/")
    return {**source, **({"config": config} if config else {}), **({"split": split} if split else {})}
