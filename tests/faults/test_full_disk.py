"""A disk that is full while a checkpoint is saved, while text is tokenised, while a result is exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.command import Command, ForkServer, assert_one_error
from tests.faults.compare import caches, differences, wrong_caches
from tests.faults.places import NAMESPACE, SmallDisk
from tests.faults.runs import Run, finished
from tests.faults.scene import Scene

pytestmark = pytest.mark.namespaces


@pytest.fixture(scope="module")
def inside() -> Iterator[ForkServer]:
    """Starts the command in a mount namespace of its own."""
    server = ForkServer(NAMESPACE)
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(scene: Scene, inside: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on a disk with room."""
    run = Run(scene, tmp_path_factory.mktemp("whole") / "place", inside, "lora")
    run.finish()
    return run


def assert_full(command: Command, place: Path) -> None:
    assert_one_error(command, str(place), "No space left on device")


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != "filler"]


def fill_when(command: Command, holds: Callable[[], object], disk: SmallDisk, but_kibibytes: int) -> None:
    assert command.until(holds), command.text()
    disk.fill(but_kibibytes)


@pytest.mark.parametrize("kibibytes", [500, 0])
def test_full_while_saving(kibibytes: int, whole: Run, scene: Scene, inside: ForkServer, tmp_path: Path) -> None:
    """Also where not even a log line has room."""
    run = Run(scene, tmp_path / "stopped", inside, "lora")
    disk = SmallDisk(inside.pid, run.folder, 64 * 1024)
    run.folder = disk.seen
    command = run.go()
    fill_when(command, lambda: 4 in run.checkpoints(), disk, but_kibibytes=kibibytes)
    assert_full(command, disk.path)
    stopped_at = run.checkpoints()
    assert stopped_at and temporaries(disk.seen) == []
    disk.make_room()
    command = run.finish()
    going_on = [line for line in command.lines() if "going on from " in line]  # as seen from beside it
    assert any(line.rstrip().endswith(f"{disk.path.name}/checkpoint-{stopped_at[-1]}") for line in going_on), going_on
    assert differences(whole.folder, disk.seen, named=disk.path) == []


def test_full_while_tokenising(whole: Run, scene: Scene, inside: ForkServer, tmp_path: Path) -> None:
    run = Run(scene, tmp_path / "stopped", inside, "lora")
    disk = SmallDisk(inside.pid, run.cache, 1024)
    disk.fill(but_kibibytes=32)  # for the first text or two
    assert_full(run.go(), disk.path)
    assert temporaries(disk.seen) == []
    assert not run.folder.exists()
    kept = caches(disk.seen)
    assert len(kept) < 3 and wrong_caches(whole.cache, disk.seen) == []
    disk.make_room()
    finished(run.command("plan", str(run.file)))
    assert caches(disk.seen) == caches(whole.cache)


def test_full_while_exporting(whole: Run, inside: ForkServer, tmp_path: Path) -> None:
    disk = SmallDisk(inside.pid, tmp_path / "disk", 64 * 1024)
    words = ("export", str(whole.folder), "-o", str(disk.path / "merged"))
    command = whole.command(*words)
    fill_when(command, lambda: any("scoring the adapter" in line for line in command.lines()), disk, but_kibibytes=64)
    assert_full(command, disk.path)
    assert [path.name for path in disk.seen.iterdir()] == ["filler"]
    disk.make_room()
    finished(whole.command(*words))
    assert (disk.seen / "merged" / "model.safetensors").is_file()
    assert shutil.disk_usage(disk.seen).free > 0
