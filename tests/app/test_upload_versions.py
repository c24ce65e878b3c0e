"""Laws of parts that come again with other bytes: the last stays, it takes the room of one, and there is an end to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.blobs import BlobStore
from app.core.uploads import MAX_VERSIONS, assemble, take_part
from app.db.uploads import Part, get_upload
from app.errors import UploadIncomplete
from tests.app.conftest import Api, rows
from tests.app.test_uploads import begin, left, look, put, send, sha256


def test_a_part_sent_with_ever_other_bytes_takes_the_room_of_one_and_is_refused_in_the_end(api: Api) -> None:
    content = rows(10, start=1900)
    upload = begin(api, content)
    versions = [str(number).encode().rjust(len(content), b"x") for number in range(20)]

    answers = [put(api, upload, 1, version) for version in versions]
    again = put(api, upload, 1, versions[0])

    assert [answer.status_code for answer in answers] == [200] * MAX_VERSIONS + [409] * (20 - MAX_VERSIONS)
    assert answers[-1].json()["code"] == "upload.too_many_versions"
    assert again.status_code == 200, "bytes that were announced are no more of them"
    assert look(api, upload)["parts"] == [{"number": 1, "sha256": sha256(versions[0])}]
    assert {name for name in left(api) if name.startswith(upload["id"])} == {f"{upload['id']}.1.{sha256(versions[0])}"}


def test_a_part_whose_bytes_are_removed_while_they_come_again_is_there_all_the_same(api: Api, tmp_path: Path) -> None:
    first, second, path = b"a", b"b", tmp_path / "part"
    upload = begin(api, first)
    send(api, upload, first)
    send(api, upload, second)
    path.write_bytes(first)
    back = Part(upload_id=upload["id"], number=1, sha256=sha256(first))

    take_part(api.engine, Crossing(api.settings.url("store_url")), back, path, expiry_h=1)

    assert back.key in api.stored()
    assert [one["sha256"] for one in look(api, upload)["parts"]] == [sha256(first)]


def test_a_part_replaced_while_the_file_is_put_together_is_one_to_wait_for(api: Api, tmp_path: Path) -> None:
    first, second = b"a", b"b"
    begun = begin(api, first)
    send(api, begun, first)
    with api.engine.connect() as conn:
        upload = get_upload(conn, begun["id"])
    assert upload is not None

    class Replacing(BlobStore):
        def stream_part(self, name: str, sha256: str) -> Iterator[bytes]:
            send(api, begun, second)
            return super().stream_part(name, sha256)

    store = Replacing(BlobStore.open(api.settings.url("store_url"))._store)
    with pytest.raises(UploadIncomplete):
        assemble(api.engine, store, upload, tmp_path / "file")


class Crossing(BlobStore):
    """A store in which bytes that had been replaced are removed just after they came once more."""

    def __init__(self, url: str) -> None:
        super().__init__(BlobStore.open(url)._store)
        self._removes = True

    def put_part(self, name: str, path: Path) -> None:
        super().put_part(name, path)
        if self._removes:
            self._removes = False
            self.delete_part(name)
