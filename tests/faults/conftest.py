"""What the tests of this folder share: the server that starts the command quickly, and the scene of the small runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.command import ForkServer
from tests.faults.scene import Scene


@pytest.fixture(scope="package")
def quick() -> Iterator[ForkServer]:
    """Starts the command in a fork."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="package")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Read it, don't write to it."""
    return Scene(tmp_path_factory.mktemp("scene"))
