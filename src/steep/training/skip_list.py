"""`skipped_steps.json`: the steps that a run passes over since it went back before them.

It lies outside of the checkpoints, since the run has gone back in them when it needs it, and is on the disk before
training goes on. So a run that is killed at any time after it passes over the same steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steep import ranks
from steep.recorded import read_json
from steep.storage import sync, write_file
from steep.training.checkpoint import step_of

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
        self.take({**self.steps, step: skipped})

    def take(self, steps: Mapping[int, Skipped]) -> None:
        """Have these steps, and wait until the file is on the disk; without any there is none."""
        self.steps = dict(steps)
        if not ranks.is_main():
            return
        if self.steps:
            write_file(self.path, json.dumps({"steps": as_json(self.steps)}) + "\n")
        elif self.path.exists():
            self.path.unlink()
            sync(self.path.parent)

    def read(self) -> None:
        """Take the file's steps, none if there is no file.

        Raises:
            UserError: it is damaged.
        """
        remedy = "Put it back from a copy: without it the run would train what it passed over."
        self.steps = from_json(read_json(self.path, remedy).get("steps", []))


def as_json(steps: Mapping[int, Skipped]) -> list[dict[str, Any]]:
    """Steps as the file has them."""
    return [{"step": step, **asdict(skipped)} for step, skipped in sorted(steps.items())]


def from_json(listed: Iterable[Mapping[str, Any]]) -> dict[int, Skipped]:
    """The steps of such a list."""
    return {item["step"]: Skipped(item["rows"], item["loss"], item["grad_norm"]) for item in listed}


def steps_behind(checkpoint: Path) -> dict[int, Skipped]:
    """The steps after a checkpoint that its run passes over.

    Raises:
        UserError: that run's list is damaged.
    """
    of_run = SkipList(checkpoint.parent)
    of_run.read()
    return {step: skipped for step, skipped in of_run.steps.items() if step > step_of(checkpoint)}
