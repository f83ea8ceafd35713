"""What tests of several modules share."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from s3_servers import KEYS, s3_server

from pipelines.cluster import cluster

# A shell ignores SIGINT in what it starts in the background, and programs that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster for the tests of one module."""
    with cluster():
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for PyTorch: of a small model two wait for one another most of the time, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    if os.geteuid():
        pytest.skip("mounting a small file system takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server."""
    with s3_server("seaweedfs", tmp_path_factory.mktemp("server")) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(seaweedfs: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of a folder of this test's own on that server."""
    for name, value in {**KEYS, "AWS_ALLOW_HTTP": "true", "AWS_ENDPOINT": seaweedfs}.items():
        monkeypatch.setenv(name, value)
    return "s3://latents/" + re.sub(r"\W+", "-", request.node.name)
