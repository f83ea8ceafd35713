"""What tests of several modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines.cluster import cluster


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster, started once and stopped at the end."""
    with cluster():
        yield
