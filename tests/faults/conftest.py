"""What the tests of this folder share: the scene of the small runs."""

from __future__ import annotations

import pytest

from tests.faults.scene import Scene


@pytest.fixture(scope="package")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Read it, don't write to it."""
    return Scene(tmp_path_factory.mktemp("scene"))
