"""Laws of a model's digest: of every file that decides what the model computes or how rows are rendered, kept where it can be."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from p2d import model_info
from p2d.files import sha256_of
from p2d.model_info import DIGEST_CACHE, digest_of, model_digest, read_model_info
from tests.p2d.test_model_info import write_model


def test_the_digest_knows_contents_and_names_but_not_times(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    assert model_digest(one) == model_digest(other)
    (other / "README.md").write_text("not part of it")
    assert model_digest(one) == model_digest(other)

    (other / "tokenizer.json").write_text('{"x": 1}')

    assert model_digest(one) != model_digest(other)


@pytest.mark.parametrize(
    "name", ["special_tokens_map.json", "added_tokens.json", "additional_chat_templates/default.jinja"]
)
def test_the_digest_knows_every_file_that_changes_how_rows_are_rendered(tmp_path: Path, name: str) -> None:
    directory = write_model(tmp_path / "m")
    found = [read_model_info(directory).digest]
    (directory / name).parent.mkdir(exist_ok=True)
    for content in ("{}", '{"x": 1}'):
        (directory / name).write_text(content)
        found.append(read_model_info(directory).digest)

    assert len(set(found)) == 3
    hashes = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    assert digest_of({each: sha256_of(path) for each, path in hashes.items()}) == found[-1]


def test_the_digest_follows_from_the_hashes_of_the_files(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m")
    for name in ("README.md", "generation_config.json", DIGEST_CACHE):
        (directory / name).write_text("{}")

    assert digest_of({path.name: sha256_of(path) for path in directory.iterdir()}) == model_digest(directory)


def test_the_digest_is_kept_and_a_broken_note_is_made_again(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m")
    digest = model_digest(directory)
    assert (directory / DIGEST_CACHE).stat().st_mode & 0o777 == 0o644, "another user of the machine reads it too"
    note = json.loads((directory / DIGEST_CACHE).read_text())
    (directory / DIGEST_CACHE).write_text(json.dumps({**note, "digest": "kept"}))
    assert model_digest(directory) == "kept"

    (directory / DIGEST_CACHE).write_text("{")

    assert model_digest(directory) == digest


def test_a_process_that_can_keep_no_note_hashes_the_files_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, hashing = write_model(tmp_path / "m"), Mock(wraps=sha256_of)
    monkeypatch.setattr(model_info, "sha256_of", hashing)
    monkeypatch.setattr(model_info, "_keep", lambda *_: None)

    digest = model_digest(directory)

    assert model_digest(directory) == digest
    assert hashing.call_count == 3
    (directory / "tokenizer.json").write_text('{"x": 1}')
    assert model_digest(directory) != digest
