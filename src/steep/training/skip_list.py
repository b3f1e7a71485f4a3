"""`skipped_steps.json`: the steps that a run passes over since it went back before them.

It lies outside of the checkpoints, since the run has gone back in them when it needs it, and is on the disk before
training goes on. So a run that is killed at any time after it passes over the same steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from steep import ranks
from steep.recorded import read_json
from steep.storage import write_file

FILE = "skipped_steps.json"


class SkipList:
    """Steps and their rows, and the file that keeps them.

    Args:
        folder: `output_dir`.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.steps: dict[int, list[int]] = {}

    def __contains__(self, step: object) -> bool:
        return step in self.steps

    def add(self, step: int, rows: Sequence[int]) -> None:
        """Add a step, and wait until the file is on the disk. One of several processes writes it."""
        self.steps[step] = [int(row) for row in rows]
        listed = [{"step": step, "rows": rows} for step, rows in sorted(self.steps.items())]
        if ranks.is_main():
            write_file(self.path, json.dumps({"steps": listed}) + "\n")

    def read(self) -> None:
        """Take the file's steps, none if there is no file.

        Raises:
            UserError: it is damaged.
        """
        remedy = "Put it back from a copy: without it the run would train what it passed over."
        listed = read_json(self.path, remedy).get("steps", [])
        self.steps = {item["step"]: item["rows"] for item in listed}

    def clear(self) -> None:
        """Forget an earlier run in this folder."""
        self.steps = {}
        if ranks.is_main():
            self.path.unlink(missing_ok=True)
