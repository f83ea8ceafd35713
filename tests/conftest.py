"""What tests of several modules share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from pipelines.cluster import cluster

# A shell ignores SIGINT in what it starts in the background, and programs that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster for the tests of one module."""
    with cluster():
        yield
