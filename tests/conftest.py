"""What tests of several modules share."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

import pytest
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
