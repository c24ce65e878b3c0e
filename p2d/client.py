"""Sync client over the HTTP API: retries, an event stream that survives cuts, downloads that resume and are verified.

    from p2d import Client
    client = Client("http://127.0.0.1:8321")
    job = client.submit({"kind": "adapt", "base_model": "smollm2-135m-instruct"}, dataset=Path("train.jsonl"))
    client.wait(job.id)
    client.download(job.id, Path("out"))

Holds no state but its connections. What a job may ask for is p2d.config's business; the service checks it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from p2d.config import JobConfig
from p2d.errors import ErrorDetail
from p2d.files import sha256_of
from p2d.service_answers import (
    Artifact,
    DownloadCorrupt,
    Event,
    Job,
    NoSuchFile,
    ServiceProblem,
    ServiceUnreachable,
    fault_of,
    job_of,
)
from p2d.service_connection import Retry, ServiceConnection, backoff_s, raise_for
from p2d.sources import named_source

__all__ = [
    "Artifact",
    "Client",
    "Data",
    "DownloadCorrupt",
    "Event",
    "Job",
    "NoSuchFile",
    "ServiceProblem",
    "ServiceUnreachable",
    "without_defaults",
]

Data = Path | str | Mapping[str, Any]
"""A dataset: a file, the id of one that the service has, what `p2d.sources` reads as a source, or JSON as POST /datasets takes it
(`{"source": {...}}`, `{"rows": [...]}`)."""

MOST = {"limit": "100"}
"""Entries of one page, where lists may be long."""

PARTS_FROM_BYTES = 64 << 20
"""Files above this are uploaded in parts. A guess: some seconds to send again on a slow line."""

FOLLOW_S = 2.0
"""Least seconds between two looks at logs that grow; workers keep new lines every ten."""

STREAM_SILENCE_S = 60.0
"""A stream silent for so long is cut: the service writes a comment line every 15 s."""


class Client:
    """One service. Usable as a context manager; safe to share between threads like httpx.Client."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8321",
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 5,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`api_key`: what the operator gave; else P2D_API_KEY of the environment; a service on this machine may need none."""
        key = api_key or os.environ.get("P2D_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # trust_env off: a proxy in the environment must not see loopback traffic.
        self._http = httpx.Client(
            base_url=base_url, timeout=timeout_s, headers=headers, transport=transport, trust_env=False
        )
        self._service = ServiceConnection(self._http, retries=retries, sleep=sleep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def submit(
        self,
        job: JobConfig | Mapping[str, Any],
        *,
        base_model: str | None = None,
        dataset: Data,
        validation_dataset: Data | None = None,
        mapping: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Send a job. A Path is uploaded; a str is the id of a dataset that the service has, or where it is to fetch one.

        `mapping` says field -> column where the data name their columns otherwise: `{"prompt": "Frage"}`.

        Sent again after a cut it still makes one job: the request carries an Idempotency-Key.
        Raises: ServiceProblem with every fault in `errors`.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return job_of(self._send_job("/jobs", job, base_model, dataset, validation_dataset, mapping, headers))

    def estimate(
        self,
        job: JobConfig | Mapping[str, Any],
        *,
        base_model: str | None = None,
        dataset: Data,
        validation_dataset: Data | None = None,
        mapping: Mapping[str, str] | None = None,
    ) -> Mapping[str, Any]:
        """What a job would take, as POST /estimates answers: seconds as intervals, bytes, AER; nothing is made or stored."""
        found = self._send_job("/estimates", job, base_model, dataset, validation_dataset, mapping, {})
        return dict(found)

    def _send_job(
        self,
        path: str,
        job: JobConfig | Mapping[str, Any],
        base_model: str | None,
        dataset: Data,
        validation_dataset: Data | None,
        mapping: Mapping[str, str] | None,
        headers: dict[str, str],
    ) -> Any:
        body = without_defaults(job) if isinstance(job, JobConfig) else dict(job)
        body |= {} if base_model is None else {"base_model": base_model}
        body |= {"mapping": dict(mapping)} if mapping else {}
        given = {"dataset": dataset, "validation_dataset": validation_dataset}
        files = {name: value for name, value in given.items() if isinstance(value, Path)}
        body |= {name: _named(value) for name, value in given.items() if isinstance(value, (str, Mapping))}
        if not files:
            return self._service.json("POST", path, headers=headers, json=body, **_patience(body))
        return self._upload(path, files, {"job": json.dumps(body)}, headers)

    def upload(self, dataset: Data, *, mapping: Mapping[str, str] | None = None) -> str:
        """Store and check a dataset; returns its id. `mapping` as for `submit`.

        A file above PARTS_FROM_BYTES goes in parts, so that a broken connection costs one part; see `resume_upload`.
        """
        if not isinstance(dataset, Path):
            body = _named(dataset)
            if isinstance(body, str):
                raise ValueError(f"{dataset!r} names no source; expected https://..., s3://... or hf:owner/name")
            body |= {"mapping": dict(mapping)} if mapping else {}
            return str(self._service.post_once("/datasets", body, **_patience(body))["id"])
        if dataset.stat().st_size > PARTS_FROM_BYTES:
            return self._upload_in_parts(dataset, mapping, None)
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        data = {"mapping": json.dumps(dict(mapping))} if mapping else {}
        return str(self._upload("/datasets", {"file": dataset}, data, headers)["id"])

    def uploads(self, **filters: str) -> Iterator[Mapping[str, Any]]:
        """All uploads in parts, newest first, page by page; filters as in GET /uploads."""
        yield from self._service.pages("/uploads", filters)

    def resume_upload(self, path: Path, *, mapping: Mapping[str, str] | None = None) -> str:
        """`upload` of a file whose upload broke off or was refused for its mapping: only parts that are not there are sent.

        What the service has of a file is found by its sha256; where it has nothing, all is sent.
        """
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
        known = next(self.uploads(status="open", sha256=whole, limit="1"), None)
        return (
            self.upload(path, mapping=mapping) if known is None else self._upload_in_parts(path, mapping, known["id"])
        )

    def _upload_in_parts(self, path: Path, mapping: Mapping[str, str] | None, begun: str | None) -> str:
        with path.open("rb") as file:
            if begun is None:
                whole = hashlib.file_digest(file, "sha256").hexdigest()
                body = {"name": path.name[:200], "size_bytes": file.tell(), "sha256": whole}
                upload = self._service.post_once("/uploads", body)
                file.seek(0)
            else:
                upload = self._service.json("GET", f"/uploads/{begun}")
            place, there = f"/uploads/{upload['id']}", {part["number"]: part["sha256"] for part in upload["parts"]}
            for number in range(1, upload["part_count"] + 1):
                part = file.read(upload["part_bytes"])
                digest = hashlib.sha256(part)
                if there.get(number) == digest.hexdigest():
                    continue
                said = f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
                headers = {"Content-Digest": said, "Content-Type": "application/octet-stream"}
                self._service.json("PUT", f"{place}/parts/{number}", headers=headers, content=part)
        body = {"mapping": dict(mapping)} if mapping else {}
        # No time limit: the service reads the whole file before it answers.
        return str(self._service.post_once(f"{place}/complete", body, timeout=None)["id"])

    def refusal(self, report: str) -> Mapping[str, Any]:
        """The report on a file that was refused: `ServiceProblem.report`, or its id."""
        found: Mapping[str, Any] = self._service.json("GET", _report_path(report))
        return found

    def faults(self, report: str) -> Iterator[ErrorDetail]:
        """Everything that such a report lists, in the order of the file, page by page."""
        for entry in self._service.pages(f"{_report_path(report)}/errors", {"limit": "1000"}):
            yield fault_of(entry)

    def job(self, job_id: str) -> Job:
        """The job as it is now."""
        return job_of(self._service.json("GET", f"/jobs/{job_id}"))

    def jobs(self, **filters: str) -> Iterator[Job]:
        """All jobs, newest first, page by page; filters as in GET /jobs."""
        for entry in self._service.pages("/jobs", filters):
            yield job_of(entry)

    def cancel(self, job_id: str) -> Job:
        """Ask the job to stop."""
        return self._move(job_id, "cancel")

    def pause(self, job_id: str) -> Job:
        """Ask the job to stand still; it is `paused` once its running steps have stopped."""
        return self._move(job_id, "pause")

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on."""
        return self._move(job_id, "resume")

    def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again; its finished steps are kept."""
        return self._move(job_id, "retry")

    def clone(self, job_id: str, patch: Mapping[str, Any] | None = None, *, idempotency_key: str | None = None) -> Job:
        """Send the request of a job again, changed by a JSON merge patch; returns the new job."""
        return job_of(self._service.post_once(f"/jobs/{job_id}/clone", patch or {}, key=idempotency_key))

    def models(self) -> list[Mapping[str, Any]]:
        """The base models that the service has."""
        return list(self._service.pages("/models", {}))

    def report(self, job_id: str) -> Mapping[str, Any]:
        """The job's report.json."""
        report: Mapping[str, Any] = self._service.json("GET", f"/jobs/{job_id}/report")
        return report

    def artifacts(self, job_id: str) -> list[Artifact]:
        """The job's files so far, but for those that have expired."""
        fields = Artifact.__dataclass_fields__
        entries = self._service.pages(f"/jobs/{job_id}/artifacts", {})
        return [Artifact(**{key: entry[key] for key in fields}) for entry in entries if not entry.get("expired")]

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """Every event after number `after`, as it happens, until the job has ended.

        A cut stream is taken up behind the last event seen. Raises ServiceUnreachable when that fails too often in a row.
        """
        failures = 0
        while True:
            ended = False
            try:
                for event in self._stream(job_id, after):
                    failures, after, ended = 0, event.seq, event.type == "end"
                    yield event
                if ended:  # and not at the event itself: a job that was retried has an earlier one in its log
                    return
            except httpx.TransportError:
                pass
            except _StreamOver:
                return
            failures += 1
            if failures > self._service.retries:
                raise ServiceUnreachable(f"The event stream of {job_id} broke {failures} times in a row.")
            self._service.sleep(backoff_s(failures))

    def wait(self, job_id: str, *, on_event: Callable[[Event], None] = lambda event: None) -> Job:
        """Follow the job to its end and return it."""
        for event in self.events(job_id):
            on_event(event)
        return self.job(job_id)

    def download(self, job_id: str, out: Path, *, names: Collection[str] | None = None) -> list[Path]:
        """Fetch the job's files, or those called `names`, into `out`; returns their paths. Raises NoSuchFile."""
        has = {artifact.name: artifact for artifact in self.artifacts(job_id)}
        if missing := [name for name in names or () if name not in has]:
            raise NoSuchFile(f"The job has no {', '.join(missing)}; it has {', '.join(sorted(has)) or 'no files yet'}.")
        out.mkdir(parents=True, exist_ok=True)
        chosen = [has[name] for name in names] if names is not None else list(has.values())
        return [self.fetch(artifact, out / Path(artifact.name).name) for artifact in chosen]

    def fetch(self, artifact: Artifact, path: Path) -> Path:
        """Fetch one file. Resumes its own partial file by Range; the file gets its name only when its sha256 is right."""
        # Named by its content too: what another file of that name left cannot be gone on with.
        partial = path.with_name(f"{path.name}.{artifact.sha256[:12]}.partial")
        failures = 0
        while (before := _size(partial)) < artifact.size_bytes:
            cause: Exception | None = None
            try:
                self._fetch_rest(artifact, partial, max(before, 0))
            except (httpx.TransportError, Retry) as error:
                cause = error
            failures = 0 if _size(partial) > before else failures + 1
            if failures > self._service.retries:
                raise ServiceUnreachable(f"The download of {artifact.name} broke {failures} times in a row.") from cause
            if failures:
                self._service.sleep(backoff_s(failures))
        sha256 = sha256_of(partial)
        if sha256 != artifact.sha256:
            partial.unlink()
            raise DownloadCorrupt(f"{artifact.name} has sha256 {sha256}, registered is {artifact.sha256}.")
        return partial.replace(path)

    # --- what is on record ----------------------------------------------------------------------------------------

    def logs(self, job_id: str) -> Iterator[Mapping[str, Any]]:
        """What workers noted of the job's attempts so far, attempt by attempt; lines as in GET /jobs/{id}/logs."""
        return self._service.pages(f"/jobs/{job_id}/logs", MOST)

    def follow_logs(self, job_id: str) -> Iterator[Mapping[str, Any]]:
        """The same, and then each line that is new, until the job has ended."""
        seen: set[str] = set()
        ended = False
        while True:
            final = self.job(job_id).is_final  # asked before the lines are read, so that those of its end are there
            count = 0
            for line in self.logs(job_id):
                count += 1
                if (key := json.dumps(line, sort_keys=True)) not in seen:
                    seen.add(key)
                    yield line
            if ended:
                return
            ended = final  # the last attempt notes its end just after the job's: look once more
            # A job of thousands of lines has many pages: no more than a few of them a second.
            self._service.sleep(max(FOLLOW_S, count / 500))

    def compare(self, job_ids: Sequence[str], *, name: str = "") -> Mapping[str, Any]:
        """Put 2 to 20 jobs side by side; what GET /comparisons/{id} answers."""
        made = self._service.post_once("/comparisons", {"job_ids": list(job_ids), "name": name})
        found: Mapping[str, Any] = self._service.json("GET", f"/comparisons/{made['id']}")
        return found

    def comparison_page(self, comparison_id: str) -> str:
        """The comparison as one HTML page that loads nothing else."""
        return self._service.text(f"/comparisons/{comparison_id}.html")

    def usage(self) -> Mapping[str, Any]:
        """What the key's project has, and the most that it may have."""
        found: Mapping[str, Any] = self._service.json("GET", "/usage")
        return found

    def audit(self, **filters: str) -> Iterator[Mapping[str, Any]]:
        """Who did what, newest first; `object=ID`: to one thing. For admins."""
        return self._service.pages("/audit", MOST | filters)

    # --- webhooks, for admins -------------------------------------------------------------------------------------

    def create_webhook(
        self, url: str, *, events: Sequence[str] = (), description: str = "", jobs: str = "all"
    ) -> Mapping[str, Any]:
        """Have a URL told of jobs' ends, or of `events`; the answer's `secret` is shown this once. `jobs` may be `named`."""
        body = {"url": url, "description": description, "jobs": jobs} | ({"events": list(events)} if events else {})
        made: Mapping[str, Any] = self._service.post_once("/webhooks", body)
        return made

    def webhooks(self) -> Iterator[Mapping[str, Any]]:
        """All webhooks of the project, newest first."""
        return self._service.pages("/webhooks", MOST)

    def test_webhook(self, webhook_id: str) -> Mapping[str, Any]:
        """Send a trial; returns the delivery."""
        sent: Mapping[str, Any] = self._service.post_once(f"/webhooks/{webhook_id}/test")
        return sent

    def deliveries(self, webhook_id: str, **filters: str) -> Iterator[Mapping[str, Any]]:
        """What was sent to a webhook, newest first; `status=failed`: only those."""
        return self._service.pages(f"/webhooks/{webhook_id}/deliveries", MOST | filters)

    def redeliver(self, webhook_id: str, delivery_id: str) -> Mapping[str, Any]:
        """Send a delivery again."""
        sent: Mapping[str, Any] = self._service.post_once(f"/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver")
        return sent

    def delete_webhook(self, webhook_id: str) -> None:
        """Remove a webhook; what waits is not sent."""
        self._service.json("DELETE", f"/webhooks/{webhook_id}")

    def _move(self, job_id: str, move: str) -> Job:
        return job_of(self._service.post_once(f"/jobs/{job_id}/{move}"))

    def _fetch_rest(self, artifact: Artifact, partial: Path, start: int) -> None:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        # The service may send on to its store; httpx leaves the key behind where the host is another.
        with self._http.stream(
            "GET", f"/artifacts/{artifact.id}/content", headers=headers, follow_redirects=True
        ) as answer:
            raise_for(answer)
            # A server that ignores Range answers 200 with the whole file: begin again.
            with partial.open("ab" if answer.status_code == 206 else "wb") as handle:
                for chunk in answer.iter_raw():  # as it arrives: what a cut leaves is kept
                    handle.write(chunk)

    def _stream(self, job_id: str, after: int) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(after)} if after else {})
        timeout = httpx.Timeout(self._http.timeout.connect, read=STREAM_SILENCE_S)
        with self._http.stream("GET", f"/jobs/{job_id}/events", headers=headers, timeout=timeout) as answer:
            try:
                raise_for(answer)
            except Retry:
                return
            if answer.status_code == 204:
                raise _StreamOver
            yield from _parse_events(answer.iter_lines())

    def _upload(self, path: str, files: Mapping[str, Path], data: Mapping[str, str], headers: Mapping[str, str]) -> Any:
        def send() -> httpx.Response:
            with contextlib.ExitStack() as stack:  # opened anew for every try: the last one may have read half of it
                parts: list[tuple[str, Any]] = [
                    (name, (file.name, stack.enter_context(file.open("rb")))) for name, file in files.items()
                ]
                parts += [(name, (None, text, "application/json")) for name, text in data.items()]
                return self._http.post(path, files=parts, headers=dict(headers), timeout=None)

        return self._service.retry(send).json()


def _named(data: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """What a job's JSON says of a dataset that is no file here."""
    if not isinstance(data, str):
        return dict(data)
    source = named_source(data)
    return data if source is None else {"source": source}


def _patience(body: Mapping[str, Any]) -> dict[str, None]:
    """No time limit where the service fetches data before it answers."""
    given = (body, body.get("dataset"), body.get("validation_dataset"))
    return {"timeout": None} if any(isinstance(one, Mapping) and "source" in one for one in given) else {}


def _report_path(report: str) -> str:
    return report if report.startswith("/") else f"/reports/{report}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def without_defaults(config: JobConfig) -> dict[str, Any]:
    """The JSON body of a config: only what differs from the defaults, so that the service's own defaults count."""
    asked, default = asdict(config), asdict(JobConfig())
    body: dict[str, Any] = {"kind": config.kind}
    for name, value in asked.items():
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if item != default[name][key]}
        if value and value != default[name]:
            body[name] = value
    return body


class _StreamOver(Exception):
    """The job has ended, and every event was seen."""


def _parse_events(lines: Iterator[str]) -> Iterator[Event]:
    """Read `text/event-stream`. An event that the cut left without its blank line is dropped, as the standard says."""
    seq, kind, data = 0, "message", ""
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "id" and value.isdigit():
                seq = int(value)
            elif name == "event":
                kind = value
            elif name == "data":
                data += value
        elif data:
            yield Event(seq=seq, type=kind, data=json.loads(data))
            kind, data = "message", ""
