"""When to kill: in a phase of the run, as its own log and its folder show it, after a share of the phase's length."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from tests.faults.command import Command
from tests.faults.runs import Run

PHASES = ("tokenise", "train", "save", "evaluate", "export")
SAVE_PARTS = ("write", "sync", "rename", "retention")
_LINES = {
    "tokenise": r"tokenising ",
    "save": r"saving checkpoint-\d+",
    "evaluate": r"scoring held-out text ",
    "export": r"scoring the adapter over the base of the run",
}
MANIFEST = "manifest.json"
KEPT = 2  # save_total_limit of the runs here


@dataclass(frozen=True)
class Aim:
    """Where a kill is meant to fall.

    Attributes:
        phase: of `PHASES`.
        nth: the how many-th such phase of the command; for `train`, the step of the run.
        share: how far into the phase, or into the part of a save; 0 to 1.
        part: of `SAVE_PARTS`, or None for a share of the whole save.
    """

    phase: str
    nth: int
    share: float
    part: str | None = None


@dataclass
class Lengths:
    """Seconds that phases took in a run that was not stopped; `step` for one of them, and the parts of a save too."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def of(self, name: str) -> float:
        return median(self.seconds[name])


def _said(command: Command, phase: str) -> int:
    """How many lines of its log open this phase."""
    return sum(re.match(_LINES[phase], line) is not None for line in command.lines())


def _size(run: Run, name: str) -> int:
    file = run.folder / name
    return file.stat().st_size if file.exists() else 0


def measure(run: Run, command: Command) -> Lengths:
    """Watch a run from its beginning to its end, and take its times."""
    lengths, opened = Lengths(), dict.fromkeys(("tokenise", "evaluate"), 0.0)
    counts = dict.fromkeys((*opened, "steps", "evaluated", "caches"), 0)
    last_step = 0.0
    saves: dict[str, float] = {}

    def look() -> bool:
        nonlocal last_step, saves
        now = time.monotonic()
        for phase in opened:
            if (said := _said(command, phase)) > counts[phase]:
                counts[phase], opened[phase] = said, now
        if (done := len(list(run.cache.rglob("*.arrow")))) > counts["caches"]:
            counts["caches"] = done
            lengths.add("tokenise", now - opened["tokenise"])
        if (size := _size(run, "evaluation.jsonl")) > counts["evaluated"]:
            counts["evaluated"] = size
            lengths.add("evaluate", now - opened["evaluate"])
        if (steps := run.steps()) > counts["steps"]:
            if counts["steps"]:
                lengths.add("step", now - last_step)
            counts["steps"], last_step = steps, now
        saves = _watch_save(run, saves, lengths, now)
        return False

    command.until(look)
    return lengths


def _watch_save(run: Run, seen: dict[str, float], lengths: Lengths, now: float) -> dict[str, float]:
    """The times of the save under way: its beginning, the manifest, the new name, the last checkpoint too many gone."""
    staging, many = run.staging(), len(run.checkpoints()) > KEPT
    if "write" not in seen:
        return {"write": now} if staging else {}
    if "sync" not in seen and any((path / MANIFEST).exists() for path in staging):
        lengths.add("write", now - seen["write"])
        return {**seen, "sync": now}
    if "retention" not in seen and not staging:
        lengths.add("sync" if "sync" in seen else "write", now - seen.get("sync", seen["write"]))
        seen = {**seen, "retention": now}
    if "retention" in seen and not many:
        lengths.add("retention", now - seen["retention"])
        lengths.add("save", now - seen["write"])
        return {}
    return seen


def strike(run: Run, command: Command, aim: Aim, lengths: Lengths) -> bool:
    """Kill the command where the aim says; False where it ended before that."""
    if aim.phase == "save" and aim.part is not None:
        begun, seconds = _part_begins(run, aim.part, aim.nth), lengths.of("sync" if aim.part == "rename" else aim.part)
    elif aim.phase == "train":
        begun, seconds = (lambda: run.steps() >= aim.nth), lengths.of("step")
    else:
        begun, seconds = (lambda: _said(command, aim.phase) >= aim.nth), lengths.of(aim.phase)
    if not command.until(begun):
        command.wait()
        return False
    end = time.monotonic() + aim.share * seconds
    while time.monotonic() < end:  # asleep, it would come late by more than a part of a save lasts
        pass
    command.kill()
    return command.code == -9


def _part_begins(run: Run, part: str, nth: int) -> Callable[[], bool]:
    """Whether a part of the nth save of this command has begun, as the run folder shows it."""
    before, saves, there = set(run.staging()), [], set(run.checkpoints())

    def begun() -> bool:
        for path in run.staging():
            if path not in before and path not in saves:
                saves.append(path)
        if len(saves) < nth:
            return False
        staging = saves[nth - 1]
        if part == "write":
            return True
        if part in ("sync", "rename"):
            return (staging / MANIFEST).exists() or not staging.exists()
        return not staging.exists() and bool(set(run.checkpoints()) - there)

    return begun


def hit(run: Run, files: int) -> str:
    """Which part of a save a kill fell into, from what it left: of `SAVE_PARTS`, or "" outside of a save.

    Args:
        files: how many files a whole checkpoint has.
    """
    counts = [len(list((run.folder / f"checkpoint-{step}").iterdir())) for step in run.checkpoints()]
    for path in run.staging():
        return "sync" if len(list(path.iterdir())) == files else "write"
    if any(count < files for count in counts):
        return "retention"
    return "rename" if len(counts) > KEPT else ""
