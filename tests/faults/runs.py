"""A run that is started, killed, and gone on with by the same command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults.command import Command, Start
from tests.faults.scene import Scene


class Run:
    """A run of a scene in a folder of its own, with a cache of its own.

    Args:
        scene: the model and the texts.
        place: a new folder: the run file, what the commands say, the cache, and ``run``.
        start: how the command is started.
        kind: of `scene.KINDS`.
    """

    def __init__(self, scene: Scene, place: Path, start: Start, kind: str = "lora", **sections: dict[str, Any]) -> None:
        place.mkdir(parents=True)
        self.place, self.folder, self.cache = place, place / "run", place / "cache"
        self.file = scene.write(place, kind, **sections)
        self._start = start

    def command(self, *words: str) -> Command:
        return self._start(words, self.place, {"STEEP_CACHE": str(self.cache)})

    def go(self) -> Command:
        """Begin, or go on: the same command, with --resume once the folder holds a run."""
        return self.command("train", str(self.file), *(["--resume"] if (self.folder / "run.yaml").exists() else []))

    def finish(self) -> Command:
        """Go on to the end.

        Raises:
            Unfinished: it ended with an error.
        """
        return finished(self.go())

    def steps(self) -> int:
        """The lines of metrics.jsonl so far."""
        file = self.folder / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.removeprefix("checkpoint-")) for path in self.folder.glob("checkpoint-*"))

    def staging(self) -> list[Path]:
        """Temporary folders that stand in the run folder."""
        return [path for path in self.folder.glob(".writing-*") if path.is_dir()]


class Unfinished(Exception):
    """A command that has to succeed did not."""


def finished(command: Command) -> Command:
    code = command.wait()
    if code != 0:
        raise Unfinished(f"exit code {code}:\n{command.text()}")
    return command
