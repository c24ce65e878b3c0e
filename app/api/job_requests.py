"""A request for a job, before anything is made of it: what it asks, and everything that is wrong with it, at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from app.api.bodies import Received, read_json, work_folder
from app.api.content import STORED
from app.api.context import Services
from app.api.datasets import SOURCE_ERRORS
from app.core.bases import find_base, is_artifact, keep_base
from app.core.ingest import Candidate, inspect_file, inspect_given
from app.core.refusals import Refusal
from app.core.submit import Content, Earlier, Inputs, find_dataset, find_earlier, refusals
from app.core.webhooks import named_webhooks
from app.dataset_errors import DatasetReaderDied, DatasetTooCostly, IntakeFull, SourceFailed
from app.db.datasets import Dataset
from app.db.engine import Connection
from app.errors import (
    ArtifactNotFound,
    DatasetNotFound,
    DiskFull,
    HeadMapMismatch,
    HeadMapNotFound,
    RequestInvalid,
    SelectionMismatch,
    SelectionNotFound,
)
from app.job_bodies import AskedJob, as_asked, read_job
from app.problems import invalid
from app.result_errors import ArtifactExpired, NotABaseModel
from app.schemas import Body, JobBody, RowsBody, SourceBody
from app.webhook_errors import WebhookNotFound
from p2d.columns import Columns, mapped
from p2d.config import Kind
from p2d.config_checks import check
from p2d.errors import (
    ConfigError,
    DatasetEmpty,
    DatasetError,
    DatasetTooLarge,
    DatasetTooSmall,
    ErrorDetail,
    MappingInvalid,
    ModelError,
    ModelNotFound,
    ModelUnsupported,
    P2DError,
    UnknownName,
)
from p2d.model_info import ModelInfo
from p2d.wording import counted

FILES = ("dataset", "validation_dataset")
"""Names of the files that may be sent along."""

REFUSALS: tuple[type[P2DError], ...] = (
    *(
        ConfigError,
        UnknownName,
        DatasetNotFound,
        DatasetError,
        DatasetEmpty,
        DatasetTooSmall,
        DatasetTooLarge,
        MappingInvalid,
    ),
    *(DatasetTooCostly, DatasetReaderDied, *SOURCE_ERRORS, IntakeFull, DiskFull, *STORED),
    *(ModelError, ModelNotFound, ModelUnsupported, ArtifactNotFound, ArtifactExpired, NotABaseModel),
    *(HeadMapNotFound, HeadMapMismatch, SelectionNotFound, SelectionMismatch, WebhookNotFound),
)
"""What a request for a job may be refused with."""


def parse_job(received: Received, shape: type[Body] = JobBody, *, kind: Kind | None = None) -> AskedJob:
    """The job of a request, with what is wrong with its fields. Raises RequestInvalid or RequestError if it has no JSON object.

    Args:   shape: what its JSON is of; of another than JobBody `kind` is the job's.
    """
    if received.json is None:
        text = "The part 'job' with the job's JSON is missing."
        raise RequestInvalid(text, errors=[ErrorDetail(code="field.missing", message=text, pointer="/job")])
    try:
        return as_asked(read_json(shape, received.json), kind)
    except RequestInvalid:
        return read_job(json.loads(received.json), shape, kind=kind)


def _misplaced(asked: AskedJob, received: Received) -> Iterator[ErrorDetail]:
    """What is wrong between the job's JSON and the files beside it."""
    body = asked.body
    for name in FILES:
        named, sent = not asked.has_read(name) or getattr(body, name) is not None, name in received.files
        if named and sent:
            text = "Given in the job and as a file."
            yield ErrorDetail(code="field.given_twice", message=text, pointer=f"/{name}")
        if name == "dataset" and not (named or sent):
            text = "Give a dataset's id, its source or its rows, or send its file."
            yield ErrorDetail(code="field.missing", message=text, pointer="/dataset")
    held = _given(body) or not all(asked.has_read(name) for name in FILES)
    if body.mapping and not received.files and not held:
        text = "A mapping is for data that come with the job; a stored dataset was read already."
        yield ErrorDetail(code="field.without_file", message=text, pointer="/mapping")


def _given(body: JobBody) -> dict[str, SourceBody | RowsBody]:
    """The datasets that the job names by their source, or holds."""
    values = {name: getattr(body, name) for name in FILES}
    return {name: value for name, value in values.items() if isinstance(value, SourceBody | RowsBody)}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedJob:
    """A job that can be made."""

    model: ModelInfo
    dataset: Content
    validation: Content | None
    stored: Mapping[str, Dataset]
    """Those of the two that the ledger had already, by their names in the body."""
    earlier: Earlier


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectedJob:
    """A job of which all was looked at that lies outside the ledger: its fields, its model, the data that came with it."""

    asked: AskedJob
    model: ModelInfo | None
    contents: Mapping[str, Content | None]
    """Datasets by their names in the body, but for those that are to be found in the ledger; None if one cannot be had."""
    candidates: Mapping[str, Candidate]
    """Datasets that came with the job, as files or in its JSON."""
    faults: _Faults

    def check(self, conn: Connection, *, keep: bool = False) -> CheckedJob:
        """Look at what the job names in the ledger, and raise everything that is wrong at once. Writes nothing.

        Args:   keep: nobody deletes the datasets, nor the base model, before the caller's transaction has ended.
        """
        body, faults, stored = self.asked.body, self.faults, dict[str, Dataset]()
        if keep and self.model is not None and is_artifact(body.base_model):  # first: see `keep_base`
            faults.catch(partial(keep_base, conn, body.base_model))
        contents = dict(self.contents)
        for name in FILES:
            if isinstance(dataset_id := getattr(body, name), str):
                found = faults.catch(partial(find_dataset, conn, dataset_id, f"/{name}", keep=keep))
                stored |= {} if found is None else {name: found}
                contents[name] = found
        dataset, validation = contents.get("dataset"), contents.get("validation_dataset")
        inputs = Inputs(
            model=self.model,
            dataset=dataset,
            validation=validation,
            validation_known=validation is not None or "validation_dataset" not in contents,
            seed_known=self.asked.has_read("training", "seed"),
        )
        config = body.config()
        earlier = find_earlier(conn, config)
        faults.add(*refusals(conn, config, inputs, earlier))
        faults.add(*named_webhooks(conn, body.webhooks))
        faults.raise_all()
        assert self.model is not None
        assert dataset is not None
        return CheckedJob(model=self.model, dataset=dataset, validation=validation, stored=stored, earlier=earlier)


def inspect_job(
    services: Services, asked: AskedJob, received: Received, stack: ExitStack, refused: list[Refusal]
) -> InspectedJob:
    """Look at everything that can be seen without a model's weights and without the ledger; `check` tells what is wrong.

    Args:   stack: until it is left, the candidates of data in the job's JSON lie in a folder.
            refused: takes what was found of data that are refused.
    """
    faults, body = _Faults(), asked.body
    if wrong := [*asked.faults, *_misplaced(asked, received)]:
        faults.add(invalid(wrong))
    faults.catch(lambda: check(body.config()))
    model = faults.catch(lambda: _model(services, body)) if asked.has_read("base_model") else None
    candidates: dict[str, Candidate] = {}
    given = _given(body)
    columns = faults.catch(lambda: mapped(body.mapping)) if asked.has_read("mapping") else None
    if columns is not None and (given or received.files):
        folder = stack.enter_context(work_folder(services.settings)) if given else Path()
        with services.intake.seat(services.known_caller):
            for name, inspect in _inspections(services, received, given, folder, columns, refused):
                if (found := faults.catch(inspect)) is not None:
                    candidates[name] = found
    named = {*received.files, *given, *(name for name in FILES if not asked.has_read(name))}
    contents = {name: candidates.get(name) for name in named}
    return InspectedJob(asked=asked, model=model, contents=contents, candidates=candidates, faults=faults)


def _inspections(
    services: Services,
    received: Received,
    given: Mapping[str, SourceBody | RowsBody],
    folder: Path,
    columns: Columns,
    refused: list[Refusal],
) -> Iterator[tuple[str, Callable[[], Candidate]]]:
    """The checks of the data that came with a job, by their names in the body."""
    settings, egress = services.settings, services.egress
    for name, file in received.files.items():
        came = {"raw_sha256": file.sha256, "pointer": f"/{name}"}
        yield name, partial(inspect_file, file.data(), settings, columns, refused, **came)
    for name, data in given.items():
        to, pointer = folder / name, f"/{name}"
        yield name, partial(inspect_given, data, settings, egress, to, columns, refused, pointer=pointer)


def _model(services: Services, body: JobBody) -> ModelInfo:
    info = find_base(services.engine, services.blobs, services.settings.models_dir, body.base_model)
    if body.revision is not None and body.revision != info.digest:
        text = f"The model {info.name!r} has another digest: {info.digest}."
        raise ModelNotFound(text, errors=[ErrorDetail(code=ModelNotFound.code, message=text, pointer="/revision")])
    return info


Found = TypeVar("Found")


class _Faults:
    """Collects errors, so that a user mends all of them at once."""

    def __init__(self) -> None:
        self._errors: list[P2DError] = []

    def catch(self, find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except P2DError as error:
            if error.fault != "user" and not isinstance(error, SourceFailed):
                raise
            self.add(error)
            return None

    def add(self, *errors: P2DError) -> None:
        self._errors += errors

    def raise_all(self) -> None:
        """Raise the one error as it is, several as one `request.invalid`."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors and all(isinstance(error, SourceFailed) for error in self._errors):
            text = " ".join(error.text for error in self._errors)
            raise SourceFailed(text, errors=[detail for error in self._errors for detail in _details(error)])
        if self._errors:
            total = sum(max(error.errors_total, 1) for error in self._errors)
            # The text of these only counts their own faults, which stand in the list.
            texts = [error.text for error in self._errors if not isinstance(error, ConfigError | RequestInvalid)]
            raise RequestInvalid(
                " ".join([f"The job has {counted(total, 'fault', 'faults')}.", *texts]),
                errors=[detail for error in self._errors for detail in _details(error)],
                errors_total=total,
            )


def _details(error: P2DError) -> Iterator[ErrorDetail]:
    yield from error.errors or (ErrorDetail(code=error.code, message=error.text),)
