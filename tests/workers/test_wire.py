"""What parent and child say arrives as it was said, and nothing that the engine prints gets in between."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from workers.engine_process import ChildDied, EngineProcess
from workers.wire import (
    CancelStep,
    Checkpointed,
    CheckpointKept,
    Message,
    Progressed,
    Ready,
    RunStep,
    StepDone,
    StepFailed,
    decode,
    encode,
)

RUN = RunStep(
    step="heads",
    shard=0,
    shards=1,
    config={"kind": "adapt", "heads": {"ratio": 0.1}},
    model_dir="/models/m",
    inputs="/in",
    out="/out",
    checkpoint=None,
    device="cpu",
    shard_rows=2000,
)


@pytest.mark.parametrize(
    "message",
    [
        RUN,
        CancelStep(),
        CheckpointKept(),
        Ready(),
        Progressed(done=1, total=2, metrics={"loss": 0.5}),
        Checkpointed(folder="/out/checkpoint/1"),
        StepDone(),
        StepFailed(error={"code": "engine.failed", "detail": "a\nb"}),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_is_one_line_and_comes_back_equal(message: Message) -> None:
    line = encode(message)

    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line) == message


def chatty(call: object, *, progress: object, models: object, on_checkpoint: object) -> None:
    """An engine that talks and asks."""
    print("noise", flush=True)
    try:
        input()
    except EOFError:
        print("no answer", flush=True)


def test_what_the_engine_prints_does_not_reach_the_wire(tmp_path: Path) -> None:
    process = EngineProcess(f"{__name__}:chatty")
    process.ensure()
    try:
        process.send(dataclasses.replace(RUN, out=str(tmp_path)))
        got = [process.receive(30), process.receive(30)]
    finally:
        process.kill()

    assert [type(message) for message in got] == [Ready, StepDone]


def test_a_child_that_cannot_start_is_a_dead_child() -> None:
    process = EngineProcess("no.such.module:function")
    process.ensure()

    with pytest.raises(ChildDied):
        process.receive(30)

    process.kill()
    assert process.pid is None
