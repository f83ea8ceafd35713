"""What tests of several modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines.cluster import cluster


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster for the tests of one module."""
    with cluster():
        yield
