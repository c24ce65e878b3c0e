"""Laws of a source in one line of text."""

from __future__ import annotations

import pytest

from p2d.sources import named_source

SOURCES = {
    "https://data.example/a.jsonl?x=1": {"type": "https", "url": "https://data.example/a.jsonl?x=1"},
    "s3://bucket/some/key": {"type": "s3", "url": "s3://bucket/some/key"},
    "hf:owner/name": {"type": "hf", "repo": "owner/name"},
    "hf:owner/name@main": {"type": "hf", "repo": "owner/name", "revision": "main"},
    "hf:owner/name/en": {"type": "hf", "repo": "owner/name", "config": "en"},
    "hf:owner/name/en/train": {"type": "hf", "repo": "owner/name", "config": "en", "split": "train"},
    "hf:owner/name@v1.0/en/train": {
        "type": "hf",
        "repo": "owner/name",
        "revision": "v1.0",
        "config": "en",
        "split": "train",
    },
    "hf:owner/name@refs/convert/parquet/en/train": {
        "type": "hf",
        "repo": "owner/name",
        "revision": "refs/convert/parquet",
        "config": "en",
        "split": "train",
    },
    "hf:owner/name@main:data/a b.csv": {
        "type": "hf",
        "repo": "owner/name",
        "revision": "main",
        "path": "data/a b.csv",
    },
    # What is wrong with these is the service's to say.
    "hf:name": {"type": "hf", "repo": "name"},
    "hf:owner/name:": {"type": "hf", "repo": "owner/name", "path": ""},
}


@pytest.mark.parametrize("text", SOURCES)
def test_a_text_names_a_source(text: str) -> None:
    assert named_source(text) == SOURCES[text]


@pytest.mark.parametrize("text", ["train.jsonl", "ds_01", "http://data.example/x", "hf:", "hf:@main", "owner/name", ""])
def test_another_text_names_none(text: str) -> None:
    assert named_source(text) is None
