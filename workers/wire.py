"""What parent and child say to each other: one JSON object a line, each a frozen dataclass. Knows no processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStep:
    """Parent to child: run this step. Paths are folders on this machine."""

    step: str
    shard: int
    shards: int
    config: Mapping[str, Any]
    model_dir: str
    inputs: str
    out: str
    checkpoint: str | None
    device: str
    shard_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CancelStep:
    """Parent to child: stop the step at the next batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointKept:
    """Parent to child: the checkpoint is stored; its folder may change again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """Child to parent: started, the engine can be called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progressed:
    """Child to parent: a sign of life after a batch."""

    done: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpointed:
    """Child to parent: this folder holds a complete checkpoint; the child waits for CheckpointKept."""

    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """Child to parent: all files of the step lie in `out`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFailed:
    """Child to parent: the step ended with this P2DError, as its JSON."""

    error: Mapping[str, Any]


Message = RunStep | CancelStep | CheckpointKept | Ready | Progressed | Checkpointed | StepDone | StepFailed

_KINDS: dict[str, type[Message]] = {
    "run": RunStep,
    "cancel": CancelStep,
    "kept": CheckpointKept,
    "ready": Ready,
    "progress": Progressed,
    "checkpoint": Checkpointed,
    "done": StepDone,
    "failed": StepFailed,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def encode(message: Message) -> bytes:
    """The message as one line."""
    return json.dumps({"type": _NAMES[type(message)], **asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message in a line; anything else is a broken child (ValueError, KeyError, TypeError)."""
    fields = json.loads(line)
    return _KINDS[fields.pop("type")](**fields)
