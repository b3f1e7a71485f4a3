"""When to kill: in a phase of the run, as its own log and its folder show it, after a share of the phase's length."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.faults.command import Command
from tests.faults.runs import Run

PHASES = ("tokenise", "train", "save", "evaluate", "export")
SAVE_PARTS = ("write", "sync", "rename", "retention")
KEPT = 2  # save_total_limit
_LINES = {
    "tokenise": r"tokenising ",
    "train": r"step \d+/\d+ ",
    "save": r"saving checkpoint-\d+",
    "evaluate": r"scoring held-out text ",
    "export": r"scoring the adapter over the base of the run|writing the adapter ",
}
_MANIFEST = "manifest.json"  # the last file of a checkpoint that is written


@dataclass(frozen=True)
class Aim:
    """Where a kill is meant to fall.

    Attributes:
        phase: of `PHASES`.
        nth: in the how many-th such phase of the command; for `train`, when so many of its steps are logged; for the
            last two parts of a save, in the how many-th after which an old checkpoint has to go.
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


def said(command: Command, phase: str) -> list[str]:
    """The lines of its log that open this phase."""
    return [line for line in command.lines() if re.match(_LINES[phase], line)]


def newest(run: Run) -> int:
    """The step of its newest checkpoint; 0 without one."""
    return max(run.checkpoints(), default=0)


def measure(run: Run, command: Command) -> Lengths:
    """Watch a run from its beginning to its end, and take its times."""
    lengths = Lengths()
    opened: dict[str, float] = {}
    counts: dict[str, int] = {}
    logged = 0
    saving: dict[str, float] = {}

    def grew(name: str, count: int) -> bool:
        before, counts[name] = counts.get(name, 0), count
        return count > before

    def look() -> bool:
        nonlocal saving, logged
        now = time.monotonic()
        if said(command, "tokenise"):
            opened.setdefault("tokenise", now)
        if grew("caches", len(run.caches())):  # all texts together
            lengths.seconds["tokenise"] = [now - opened.get("tokenise", now)]
        if grew("scorings", len(said(command, "evaluate"))):
            opened["evaluate"] = now
        if grew("scores", run.size("evaluation.jsonl")):
            lengths.add("evaluate", now - opened.get("evaluate", now))
        before, logged = logged, run.logged()
        if logged > before:
            if "step" in opened:
                lengths.add("step", (now - opened["step"]) / (logged - before))
            opened["step"] = now
        saving = _watch_save(run, command, saving, lengths, now)
        return False

    command.until(look)
    return lengths


def _watch_save(run: Run, command: Command, seen: dict[str, float], lengths: Lengths, now: float) -> dict[str, float]:
    """Note the times of the save under way, by the part that begins then."""
    saves = said(command, "save")
    if not saves:
        return seen
    if seen.get("number") != len(saves):
        return {"number": len(saves), "write": now}
    folder = run.folder / saves[-1].split()[-1]
    if "sync" not in seen and (folder.exists() or any((path / _MANIFEST).exists() for path in run.staging())):
        lengths.add("write", now - seen["write"])
        seen = {**seen, "sync": now}
    if "rename" not in seen and folder.exists():
        lengths.add("sync", now - seen["sync"])
        seen = {**seen, "rename": now}
    if "rename" in seen and "retention" not in seen and len(run.checkpoints()) <= KEPT:
        lengths.add("rename", now - seen["rename"])
        seen = {**seen, "retention": now}
    if "retention" in seen and "end" not in seen and not run.staging():
        lengths.add("retention", now - seen["retention"])
        lengths.add("save", now - seen["write"])
        seen = {**seen, "end": now}
    return seen


def strike(run: Run, command: Command, aim: Aim, lengths: Lengths) -> bool:
    """Kill the command where the aim says; False where it ended before that."""
    start, nth = newest(run), aim.nth
    if aim.part in ("rename", "retention"):
        nth += max(0, KEPT - len(run.checkpoints()))

    def begun() -> bool:
        if aim.phase == "train":
            return bool(said(command, "train")) and run.logged() >= start + aim.nth
        return len(said(command, aim.phase)) >= nth

    if not command.until(begun):
        command.wait()
        return False
    if aim.part is not None and not command.until(
        lambda: _part_begun(run, aim.part, said(command, "save")[nth - 1]), asleep=False
    ):
        command.wait()
        return False
    length = lengths.of(aim.part or {"train": "step"}.get(aim.phase, aim.phase))
    end = time.monotonic() + aim.share * length
    while time.monotonic() < end:  # asleep, it would come late by more than a part of a save lasts
        pass
    command.kill()
    return command.code == -9


def _part_begun(run: Run, part: str | None, line: str) -> bool:
    """Whether a part of the save that a line opened has begun, as the run folder shows it."""
    folder = run.folder / line.split()[-1]
    if part == "write":
        return bool(run.staging())
    if part == "sync":
        return folder.exists() or any((path / _MANIFEST).exists() for path in run.staging())
    if part == "rename":
        return folder.exists()
    return folder.exists() and len(run.checkpoints()) <= KEPT


def fell_into(run: Run, command: Command, caches: int) -> tuple[str, str]:
    """The phase that a kill fell into, and of a save its part, from what it left on the disk and in the log.

    The phase is "start" where the command still loaded, or had nothing of this kind left to do.

    Args:
        caches: how many token caches a run makes.
    """
    if part := _part_hit(run, command):
        return "save", part
    if len(run.caches()) < caches:
        return ("tokenise" if said(command, "tokenise") else "start"), ""
    if scoring := said(command, "evaluate"):
        at = re.search(r"at step (\d+)", scoring[-1])
        step = int(at[1]) if at else 0 if "base model" in scoring[-1] else run.last_step
        if step not in run.scored_steps():
            return "evaluate", ""
    return ("train" if said(command, "train") else "start"), ""


def _part_hit(run: Run, command: Command) -> str:
    saves = said(command, "save")
    if not saves:
        return ""
    hidden, name = run.staging(), saves[-1].split()[-1]
    if not (run.folder / name).exists():
        return ("sync" if any(_is_whole(path / _MANIFEST) for path in hidden) else "write") if hidden else ""
    if hidden:
        return "retention"
    told = any(line.startswith(f"{name} is saved") for line in command.lines())
    return "rename" if not told or len(run.checkpoints()) > KEPT else ""


def _is_whole(manifest: Path) -> bool:
    try:
        json.loads(manifest.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
