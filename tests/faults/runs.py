"""A run that is started, killed, and gone on with by the same command."""

from __future__ import annotations

import json
from collections.abc import Collection
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

    def __getstate__(self) -> dict[str, Any]:
        """What starts its commands stays in its process."""
        return {**self.__dict__, "_start": None}

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

    def export(self, output: Path, form: str = "merged") -> Command:
        return self.command("export", str(self.folder), "-o", str(output), "--to", form)

    def size(self, name: str) -> int:
        """Bytes of a file of the run folder; 0 where it is not there."""
        file = self.folder / name
        return file.stat().st_size if file.exists() else 0

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of one of the run's logs."""
        text = (self.folder / name).read_text(encoding="utf-8") if self.size(name) else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def logged(self) -> int:
        """The step of the last whole line of metrics.jsonl; 0 without one."""
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8") if self.size("metrics.jsonl") else ""
        return json.loads(text.split("\n")[-2])["step"] if "\n" in text else 0

    def scored_steps(self) -> set[int]:
        """The steps at which held-out text was scored."""
        return {row["step"] for row in self.rows("evaluation.jsonl")}

    def best_step(self, domain: str, steps: Collection[int]) -> int:
        """That of `steps` at which `domain` scored best."""
        rows = [row for row in self.rows("evaluation.jsonl") if row["domain"] == domain and row["step"] in steps]
        return min(rows, key=lambda row: row["bits_per_byte"])["step"]

    @property
    def last_step(self) -> int:
        """The steps of the whole run."""
        return json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))["steps"]

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints that stand there."""
        return sorted(int(path.name.removeprefix("checkpoint-")) for path in self.folder.glob("checkpoint-*"))

    def staging(self) -> list[Path]:
        """Temporary folders that stand in the run folder."""
        return [path for path in self.folder.glob(".writing-*") if path.is_dir()]

    def caches(self) -> list[Path]:
        """The token caches that stand there."""
        return list(self.cache.rglob("*.arrow"))


class Unfinished(Exception):
    """A command that has to succeed did not."""


def finished(command: Command) -> Command:
    code = command.wait()
    if code != 0:
        raise Unfinished(f"exit code {code}:\n{command.text()}")
    return command
