"""Shared fixtures: where the reference material lies, if it does."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A machine that does something else besides is no reason for a test to fail: no property here is about time.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


# The files that take minutes start first: the others fill what time is left.
LONGEST = ("test_slurm.py", "test_readme.py", "test_tile_training.py", "test_slide_training.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def no_address_left_behind() -> Iterator[None]:
    """A run made inside a test's process leaves the address of its group in the environment, and another process would
    take it."""
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real slides and tiles beside the checkout; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name}/ beside the checkout: real slides and tiles are not here")
    return SHARED


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The reference implementations' numbers: ``GOLDENS=DIR``, or ``shared/goldens`` beside the checkout."""
    folder = Path(os.environ.get("GOLDENS", SHARED / "goldens"))
    if not folder.is_dir():
        pytest.skip("no goldens: set GOLDENS=DIR to the folder of reference numbers")
    return folder
