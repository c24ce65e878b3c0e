"""Every P2D_ variable: name, type, unit and default. Reads the environment and nothing else.

A server URL that is absent means the embedded part: `app.embedded` starts it and hands on settings with the URL filled in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from p2d.pipeline import SHARD_ROWS

MiB = 1 << 20

RETRY_S = (5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)


class Settings(BaseSettings):
    """The service's settings. Each is read from the environment as P2D_ + the upper-case name."""

    model_config = SettingsConfigDict(env_prefix="P2D_", frozen=True, extra="forbid", use_attribute_docstrings=True)

    database_url: SecretStr | None = None
    """PostgreSQL >= 14, as `postgresql://user:password@host:port/name`. Absent: embedded."""
    broker_url: SecretStr | None = None
    """Redis or Valkey, as `redis://host:port/0`. Carries wake-ups only. Absent: embedded."""
    store_url: SecretStr | None = None
    """Object store: `file:///path`, or `s3://bucket/prefix?endpoint=http://host:port&region=...`. Absent: a folder in home.
    S3 credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""

    presign: bool = False
    """Whether clients get files of jobs from an S3 store itself, and may put parts of uploads there, by signed URLs that live for
    minutes. They must reach the store under the endpoint of P2D_STORE_URL. Needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""

    home: Path = Field(default_factory=lambda: Path.home() / ".p2d")
    """Directory of everything that P2D keeps on this machine: embedded servers, store, models, logs."""
    models_dir: Path = Path()
    """Directory of the installed base models, one directory each. Default: `models` in home."""
    work_dir: Path = Path()
    """Directory for uploads and running steps, emptied as they end. Default: `work` in home."""

    host: str = "127.0.0.1"
    """Address that the API listens on."""
    port: int = Field(default=8321, ge=0, le=65535)
    """Port that the API listens on; 0 = a free one."""

    key_pepper: SecretStr | None = Field(default=None, min_length=32)
    """Secret that API keys are hashed with: 32 characters or more, the same for every process. Absent: a file in home, made
    with the first key."""

    rate_per_minute: int = Field(default=600, ge=1)
    """Requests of one project in a minute, over all its keys; more are answered with 429. Not without keys."""
    quota_jobs: int = Field(default=1000, ge=1)
    """Jobs of one project that have not ended; more are refused with 429."""
    quota_bytes: int = Field(default=100 * 1024 * MiB, ge=1)
    """Bytes of one project's datasets, open uploads and jobs' files; more are refused with 429. Running jobs may exceed it."""
    quota_rows: int = Field(default=100_000_000, ge=1)
    """Rows of one project's datasets; more are refused with 429."""
    quota_webhooks: int = Field(default=20, ge=1)
    """Webhooks of one project; more are refused with 429."""

    max_upload_bytes: int = Field(default=1024 * MiB, ge=1)
    """Largest dataset file, in bytes. A larger upload is cut off with 413."""
    upload_part_bytes: int = Field(default=8 * MiB, ge=1)
    """Size of one part of an upload in parts, in bytes; more where a file would have above 10,000 parts."""
    upload_expiry_h: float = Field(default=24, gt=0)
    """Hours without a new part after which an upload in parts is given up."""
    max_rows: int = Field(default=1_000_000, ge=1)
    """Most rows of one dataset."""
    max_row_bytes: int = Field(default=1 * MiB, ge=64)
    """Longest row, in bytes."""
    max_json_bytes: int = Field(default=1 * MiB, ge=1024)
    """Largest JSON body, in bytes."""
    egress: Annotated[tuple[str, ...], NoDecode] = ()
    """Hosts that datasets may be fetched from, with commas between: `data.example.org`, `*.example.org` for all below a name,
    `*` for every public host. Empty: nothing is fetched. The Hugging Face Hub needs `huggingface.co,*.hf.co`."""
    source_buckets: Annotated[tuple[str, ...], NoDecode] = ()
    """Buckets that every project may take datasets from, with the service's own S3 credentials: URLs like that of the store,
    with commas between; a prefix there bounds what is open. The store's own bucket is never one of them."""
    fetch_max_s: float = Field(default=300.0, gt=0)
    """Seconds that fetching one dataset file may take."""
    check_max_s: float = Field(default=600.0, gt=0)
    """Seconds, of the clock and of the processor, that the process may take which checks a dataset file."""
    check_memory_bytes: int = Field(default=2048 * MiB, ge=256 * MiB)
    """Address space of that process, in bytes (Linux); Python and pyarrow alone take 0.6 GiB of it."""
    check_file_bytes: int = Field(default=4096 * MiB, ge=1 * MiB)
    """Largest file that that process may write, in bytes: an unpacked file, or the rows in their stored form."""
    disk_floor: float = Field(default=0.1, ge=0, lt=1)
    """Share of a disk that uploads leave free, but of a large disk no more than twice P2D_MAX_UPLOAD_BYTES: while less is free on
    the disk of P2D_WORK_DIR or of a local store, files and rows are refused with 507. 0 = they may fill it."""

    reports_kept_d: float = Field(default=30.0, gt=0)
    """Days that the report on a refused file stays."""

    cost_per_hour: float | None = Field(default=None, gt=0)
    """What an hour of a worker costs, in any currency: estimates then say what a job costs. Absent: they name no price."""

    shard_rows: int = Field(default=SHARD_ROWS, ge=1)
    """Most rows of one shard of the response pass. A part of the result: only the default gives what `p2d run` gives."""
    engine: str = "p2d.pipeline:run_step"
    """What runs a step in the worker's child process, as `module:function`."""
    device: str = "auto"
    """Where the engine runs: auto, cpu, cuda, cuda:0, mps."""
    worker_queue: str = "default"
    """Queue that a worker serves and a job goes to."""

    webhook_hosts: Annotated[tuple[str, ...], NoDecode] = ("*",)
    """Hosts that webhooks may be sent to, with commas between, as in `P2D_EGRESS`: over https alone, and to public addresses
    alone. Empty: to none."""
    webhook_inside: Annotated[tuple[str, ...], NoDecode] = ()
    """Hosts that webhooks may be sent to wherever they are, over http too: `host:port`, or `host` for the scheme's own port, with
    commas between, as in `127.0.0.1:9000,hooks.lan`. Whoever may make a webhook can have requests sent there."""
    webhook_retry_s: Annotated[tuple[Annotated[float, Field(ge=0)], ...], NoDecode] = RETRY_S
    """Seconds after each failed try of a delivery until the next one, with commas between, each made up to a fifth longer by
    chance; after the last one the delivery has failed. The default is Standard Webhooks' example: ten tries in three days."""
    webhook_timeout_s: float = Field(default=15.0, gt=0)
    """Seconds that one try of a delivery may take."""
    webhook_hands: int = Field(default=4, ge=0)
    """Deliveries that a worker sends side by side, beside its steps; 0 = none, where other workers do."""
    webhook_old_secret_h: float = Field(default=24.0, gt=0)
    """Hours that the old secret of a webhook still signs, beside the new one, after it was rotated."""
    webhook_failing_d: float = Field(default=5.0, gt=0)
    """Days without one delivery that succeeded, from the first that failed, after which a webhook is disabled."""
    webhook_kept_d: float = Field(default=30.0, gt=0)
    """Days that a delivery stays in the list after it ended."""

    lease_s: float = Field(default=60.0, gt=0)
    """Seconds until a silent worker loses its step."""
    heartbeat_s: float = Field(default=10.0, gt=0)
    """Seconds between two signs of life of a worker; at most a quarter of the lease is wise."""
    reconcile_s: float = Field(default=15.0, gt=0)
    """Seconds between two sweeps for expired leases and forgotten wake-ups."""
    garbage_s: float = Field(default=600.0, gt=0)
    """Seconds between two sweeps of a worker for what nobody needs any more: checkpoints, and objects of the store."""
    unreferenced_kept_h: float = Field(default=24.0, ge=1)
    """Hours that an object stays in the store after it was last used, when no dataset, job or checkpoint refers to it."""
    checkpoints_kept_d: float = Field(default=7.0, ge=0)
    """Days that a job which failed or was cancelled keeps its checkpoint; a later retry trains from the beginning."""
    jobs_kept_d: float | None = Field(default=None, ge=0)
    """Days after which an ended job is deleted by itself, with all that `DELETE /jobs/{id}` deletes; but not while a job that
    has not succeeded reads its head map, selection or adapter. Absent: jobs are kept for ever."""
    poll_s: float = Field(default=5.0, gt=0)
    """Seconds after which an idle worker looks for work without a wake-up."""
    cancel_grace_s: float = Field(default=10.0, gt=0)
    """Seconds that a child gets to stop by itself, and again after TERM, before it is killed."""
    stall_s: float = Field(default=1800.0, gt=0)
    """Seconds without any progress after which a child counts as hung."""
    max_crashes: int = Field(default=3, ge=1)
    """Crashes of one step after which its job fails with `job.worker_lost`."""

    api_processes: int = Field(default=1, ge=1, le=64)
    """Processes of the API that `p2d up` starts on the one port. A slow core takes some fifty new jobs a second."""
    db_pool_size: int = Field(default=10, ge=1)
    """Database connections of one process."""
    db_pool_wait_s: float = Field(default=2.0, gt=0)
    """Seconds that a request waits for a connection before it is answered with 503."""
    sse_poll_s: float = Field(default=0.25, gt=0)
    """Seconds between two looks for new events of the streams that are open."""
    sse_ping_s: float = Field(default=15.0, gt=0)
    """Seconds between two comment lines on a silent stream, so that proxies keep it open."""
    max_streams: int = Field(default=2000, ge=1)
    """Event streams open at once in one process; more are answered with 503."""
    project_streams: int = Field(default=200, ge=1)
    """Of these most of one project, over all its keys and with the requests that wait for events; more are answered with 429.
    Not without keys."""

    @field_validator("egress", "source_buckets", "webhook_hosts", "webhook_inside", "webhook_retry_s", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(one.strip() for one in value.split(",") if one.strip()) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _below_home(cls, values: Any) -> Any:
        if isinstance(values, dict):
            home = Path(values.get("home") or Path.home() / ".p2d").expanduser()
            values = {"models_dir": home / "models", "work_dir": home / "work", **values, "home": home}
        return values

    def url(self, name: str) -> str:
        """The text of `database_url`, `broker_url` or `store_url`, which must be there by now."""
        secret = getattr(self, name)
        assert isinstance(secret, SecretStr), f"{name} is not set: start the embedded servers first"
        return secret.get_secret_value()
