"""Folders that may not be written, that lose their permission in mid-run, and that are deleted in mid-run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.command import ForkServer, assert_one_error
from tests.faults.compare import differences
from tests.faults.places import UNPRIVILEGED
from tests.faults.runs import Run
from tests.faults.scene import Scene


@pytest.fixture(scope="module")
def as_user() -> Iterator[ForkServer]:
    """Starts the command without root's right to write through permissions."""
    server = ForkServer(UNPRIVILEGED)
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(scene: Scene, quick: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happens to."""
    run = Run(scene, tmp_path_factory.mktemp("whole") / "place", quick, "lora")
    run.finish()
    return run


@pytest.mark.setpriv
@pytest.mark.parametrize("what", ["the run folder", "the folder above", "the cache"])
def test_a_folder_that_may_not_be_written(what: str, scene: Scene, as_user: ForkServer, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    folder = {"the run folder": closed, "the folder above": closed / "run", "the cache": tmp_path / "run"}[what]
    run = Run(scene, tmp_path / "place", as_user, training={"output_dir": str(folder)})
    closed.mkdir()
    closed.chmod(0o500)
    if what == "the cache":
        run.cache = closed
    assert_one_error(
        run.go(), str(closed), "Permission denied" if what == "the cache" else "Give a folder you may write"
    )
    assert list(closed.iterdir()) == []


@pytest.mark.setpriv
def test_permission_taken_away_in_mid_run(whole: Run, scene: Scene, as_user: ForkServer, tmp_path: Path) -> None:
    run = Run(scene, tmp_path / "stopped", as_user, "lora")
    command = run.go()
    assert command.until(lambda: 4 in run.checkpoints()), command.text()
    run.folder.chmod(0o500)
    assert_one_error(command, str(run.folder), "Permission denied")
    assert run.checkpoints()
    run.folder.chmod(0o700)
    assert run.staging() == []
    run.finish()
    assert differences(whole.folder, run.folder) == []


def test_the_run_folder_deleted_in_mid_run(scene: Scene, quick: ForkServer, tmp_path: Path) -> None:
    run = Run(scene, tmp_path / "place", quick, "lora")
    command = run.go()
    assert command.until(lambda: 4 in run.checkpoints()), command.text()
    run.folder.rename(tmp_path / "moved")  # at one stroke; a run that writes while its files go leaves the same
    shutil.rmtree(tmp_path / "moved")
    assert_one_error(command, "training.output_dir", str(run.folder), "was moved or deleted", "--resume")
    assert not run.folder.exists()


@pytest.mark.parametrize("which", ["newest", "oldest"])
def test_a_checkpoint_deleted_in_mid_run(
    which: str, whole: Run, scene: Scene, quick: ForkServer, tmp_path: Path
) -> None:
    """The run needs none of them but to be resumed; it ends as it would have."""
    run = Run(scene, tmp_path / "stopped", quick, "lora")
    command = run.go()
    assert command.until(lambda: len(run.checkpoints()) == 2), command.text()
    shutil.rmtree(run.folder / f"checkpoint-{run.checkpoints()[{'newest': -1, 'oldest': 0}[which]]}")
    assert command.wait() == 0, command.text()
    assert differences(whole.folder, run.folder) == []
