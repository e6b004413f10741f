"""One SLURM for all tests of a test process."""

from collections.abc import Iterator

import pytest

from tests.launch.slurm_cluster import Cluster, Unavailable, running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running SLURM of two nodes. Tests that need it are skipped with the reason where it can't be had."""
    try:
        starting = running()
        found = starting.__enter__()
    except Unavailable as reason:
        pytest.skip(str(reason))
    yield found
    starting.__exit__(None, None, None)
