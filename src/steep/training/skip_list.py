"""`skipped_steps.json`: the steps that a run passes over since it went back before them.

It lies outside of the checkpoints, since the run has gone back in them when it needs it, and is on the disk before
training goes on. So a run that is killed at any time after it passes over the same steps.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from steep import ranks
from steep.recorded import read_json
from steep.storage import write_file

FILE = "skipped_steps.json"


@dataclass(frozen=True)
class Skipped:
    """A step that is passed over.

    Attributes:
        rows: their numbers; none where they are not known.
        loss, grad_norm: what the step was passed over for, so that the run knows it without computing it again.
    """

    rows: list[int]
    loss: float
    grad_norm: float


class SkipList:
    """Steps and what was in them, and the file that keeps them.

    Args:
        folder: `output_dir`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.steps: dict[int, Skipped] = {}

    def __contains__(self, step: object) -> bool:
        return step in self.steps

    def add(self, step: int, skipped: Skipped) -> None:
        """Add a step, and wait until the file is on the disk. One of several processes writes it."""
        self.steps[step] = skipped
        listed = [{"step": step, **asdict(skipped)} for step, skipped in sorted(self.steps.items())]
        if ranks.is_main():
            write_file(self.path, json.dumps({"steps": listed}) + "\n")

    def read(self) -> None:
        """Take the file's steps, none if there is no file.

        Raises:
            UserError: it is damaged.
        """
        remedy = "Put it back from a copy: without it the run would train what it passed over."
        listed = read_json(self.path, remedy).get("steps", [])
        self.steps = {item["step"]: Skipped(item["rows"], item["loss"], item["grad_norm"]) for item in listed}

    def clear(self) -> None:
        """Forget an earlier run in this folder."""
        self.steps = {}
        if ranks.is_main():
            self.path.unlink(missing_ok=True)
