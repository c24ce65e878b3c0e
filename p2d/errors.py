"""The tree of errors that the engine raises; every one carries a stable code, whose fault it is and what to do next.

P2DError
├── ConfigError            a field of the job is wrong
│   └── UnknownName        a name that no registry holds
├── DatasetError           the rows are wrong
├── ModelError             the base model is missing, broken or of an unsupported family
├── EngineError            the run itself failed (diverged, out of memory, ...)
├── OutInUse               another run works in the folder of the results
├── OutUnusable            there can be no such folder
└── Cancelled              somebody asked the run to stop; never the user's mistake

Errors cross processes and HTTP as the JSON of `P2DError.to_json`, never pickled. This file does not know HTTP:
`app.problems` turns it into RFC 9457.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

Fault = Literal["user", "service", "capacity", "dependency"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorDetail:
    """One fault among several: where it is, its code and what was expected. Never holds row text."""

    code: str
    message: str
    pointer: str | None = None
    """JSON pointer into the request body or the row, for example `/heads/ratio` or `/answer`."""
    line: int | None = None
    """1-based line of the dataset file (row number for formats without lines), or of a JSON body."""
    column: int | None = None
    """1-based character of that line."""
    expected: str | None = None
    """What would have been right, where that can be said in a few words."""
    got: str | None = None
    """What came instead: a type, a size, a number or a misspelt word. Never text of a row or a secret."""


class P2DError(Exception):
    """A mistake of our own; also the base of all errors that a user may see."""

    code: ClassVar[str] = "internal.error"
    fault: ClassVar[Fault] = "service"
    hint: ClassVar[str] = "Report this with the request id."

    def __init__(
        self, text: str, *, errors: Iterable[ErrorDetail] = (), errors_total: int | None = None, **facts: Any
    ) -> None:
        super().__init__(text)
        self.text = text
        self.errors = tuple(errors)
        self.errors_total = len(self.errors) if errors_total is None else errors_total
        self.facts: Mapping[str, Any] = facts
        self.report: str | None = None
        """Where all is listed of which errors[] holds the first: a path of the service's, or a file on this machine."""

    @property
    def retryable(self) -> bool:
        """Whether the same call can work later without a change by the user."""
        return self.fault != "user"

    def to_json(self) -> dict[str, Any]:
        """The one wire form of an error: pipe, `job.error` and problem+json are made from it."""
        return {
            "code": self.code,
            "fault": self.fault,
            "retryable": self.retryable,
            "detail": self.text,
            "hint": self.hint,
            "errors": [asdict(error) for error in self.errors],
            "errors_total": self.errors_total,
            "facts": dict(self.facts),
            **({} if self.report is None else {"report": self.report}),
        }


class ConfigError(P2DError):
    """A field of the job is out of range or contradicts another."""

    code, fault, hint = "config.invalid", "user", "Mend the fields that are named and try again."


class UnknownName(ConfigError):
    """A scorer, recipe, metric or projection that no registry holds."""

    code, hint = "config.unknown_name", "Use one of the names listed in the message."


class DatasetError(P2DError):
    """Rows that cannot be used; errors[] names the first hundred bad lines, the report all."""

    code, fault, hint = "dataset.invalid", "user", "Mend the lines that are named and try again."


class DatasetEmpty(DatasetError):
    """A file without a single row."""

    code, hint = "dataset.empty", "Give a file with at least one row."


class DatasetFileMissing(DatasetError):
    """A path on this machine where there is no file."""

    code, hint = "dataset.file_missing", "Check the path."


class MappingInvalid(DatasetError):
    """A mapping of columns that makes no row, or names columns that the file does not have."""

    code, hint = "dataset.mapping", "Map the fields of one kind of row to columns that the file has."


class DatasetTooSmall(DatasetError):
    """Fewer rows than the job needs."""

    code, hint = "dataset.too_small", "Add rows, or give a lower heads.proxy_rows."


class DatasetTooLarge(DatasetError):
    """A file, row count or row above the service's limit."""

    code, hint = "dataset.too_large", "Split the file, or ask the operator to raise the limit."


class RowTooLong(DatasetError):
    """Rows that do not fit the model's context (or training.max_length)."""

    code, hint = (
        "dataset.row_too_long",
        "Shorten or drop the lines that are named, or use a model with a longer context.",
    )


class TemplateRefuses(DatasetError):
    """Conversations that the chat template of the base model does not take, such as one with a system turn."""

    code, hint = (
        "dataset.template_refuses",
        "Drop the turns that the model does not know (often the system turn), or use another base model.",
    )


class ModelError(P2DError):
    """The base model cannot be used."""

    code, fault, hint = (
        "model.invalid",
        "user",
        "Check the model directory: config.json, tokenizer.json and safetensors weights.",
    )


class ModelNotFound(ModelError):
    """No model of that name is installed."""

    code, hint = (
        "model.not_found",
        "Check the name or path; `p2d models list` says what is installed, `p2d models add` adds one.",
    )


class ModelUnsupported(ModelError):
    """A family without an architecture spec, a setting that the engine does not follow, or weights that are quantised."""

    code, hint = (
        "model.unsupported",
        "Use a model whose family docs/models.md lists, with plain weights (F32, BF16 or F16).",
    )


class AdapterMismatch(ModelError):
    """The adapter was made for other base weights."""

    code, hint = "adapter.base_mismatch", "Apply the adapter to the base model whose digest stands in its manifest."


class EngineError(P2DError):
    """The run failed inside the engine."""

    code, hint = "engine.failed", "Retry the job; if it fails again, report it with the job id."
    fault: ClassVar[Fault] = "service"


class Diverged(EngineError):
    """A loss or gradient was not finite."""

    code, fault, hint = (
        "engine.diverged",
        "user",
        'Lower training.learning_rate, or leave it "auto".',
    )


class OutOfMemory(EngineError):
    """The device ran out of memory."""

    code, fault, hint = (
        "engine.out_of_memory",
        "capacity",
        "Shorten the longest rows (training.max_length names them), lower training.batch_size (for `icl` data.n_demos too), or use "
        "a device with more memory.",
    )


class OutInUse(P2DError):
    """Another run without the service works in the same folder."""

    code, fault, hint = "run.out_in_use", "user", "Wait for the other run, or give this one another folder."


class OutUnusable(P2DError):
    """The results of a run without the service cannot be written where they were to go."""

    code, fault, hint = "run.out_unusable", "user", "Name a folder that is there or can be made, and may be written to."


class Cancelled(P2DError):
    """The run stopped because it was asked to."""

    code, fault, hint = "job.cancelled", "user", "Nothing to do: the job was cancelled on request."
