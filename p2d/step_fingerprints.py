"""Which steps need not be computed again, and what decides their output: equal fingerprint, equal output. No torch here.

These are the two steps that pass over the base model before anything is trained. Training is not among them: its
manifest.json names its own job's whole config, and what it costs is what a job is there to show. Who remembers
fingerprints, and where the outputs then come from, is the service's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2d.config import POOL_FACTOR, WITHOUT_PROXY, JobConfig, config_json, samples_first
from p2d.pipeline import STEPS
from p2d.versions import fingerprint

REUSABLE = ("heads", "respond")


def fields_read(step: str, config: JobConfig) -> list[str]:
    """The fields of a resolved config that decide the step's output. A test watches the steps read them, and no others."""
    training = ["training.slices", "training.precision", "training.seed"]
    if step == "heads":
        proxy = [] if config.heads.scorer in WITHOUT_PROXY else ["heads.proxy_rows", "training.batch_size"]
        return ["heads.scorer", *proxy, *training]
    assert step == "respond", step
    fields = ["data.scorer", "data.mode", *training]
    # The ratio decides how many rows are drawn into the pool, unless it is so large that all are (`p2d.config.pool_count`).
    # Left open, it lets a sample be scored first, unless scores are what the job is for (`p2d.config.samples_first`).
    ratio = config.data.ratio
    few = config.data.mode == "fast" and ratio != "auto" and POOL_FACTOR * ratio < 1
    if few or samples_first(config):
        fields.append("data.ratio")
    if config.data.scorer == "icl":
        fields += ["data.metric", "data.n_demos", "data.n_queries"]
    return fields


def step_fingerprint(
    step: str,
    *,
    shard: int,
    shards: int,
    config: JobConfig,
    files: Mapping[str, str],
    model: tuple[str, str],
    device: str,
    engine: str,
) -> str:
    """The fingerprint of one step or shard.

    Args:   config: resolved. files: sha256 of each input by name. model: name and digest. device: only its kind counts.
            engine: what runs the step, as `module:function`.
    """
    assert step in REUSABLE, step
    asked = config_json(config)
    # plan.json is not hashed: it holds estimates in seconds, and fields that this step does not read.
    read = [name for name in STEPS[step].reads if name != "plan.json"]
    facts: dict[str, Any] = {
        "step": [step, shard, shards],
        "config": {name: _field(asked, name) for name in fields_read(step, config)},
        "files": {name: files[name] for name in read},
        "model": list(model),
        "device": device.partition(":")[0],
        "engine": engine,
    }
    return fingerprint(facts)


def _field(asked: Mapping[str, Any], name: str) -> Any:
    group, _, field = name.partition(".")
    return asked[group][field]
