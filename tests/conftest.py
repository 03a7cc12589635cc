"""Fixtures shared by all tests: the real data beside the repository, where it exists."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and published checkpoints; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip("no folder of real data beside the repository")
    return SHARED
