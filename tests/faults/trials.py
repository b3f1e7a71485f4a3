"""One trial: a run from its tokenisation to its export, killed some ten times on the way, and gone on with each time.

What it leaves is compared after each kill and at the end with a run that was never stopped.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.command import Command, Start
from tests.faults.compare import damaged_checkpoints, differences, lines_lost_or_doubled, wrong_caches
from tests.faults.instants import SAVE_PARTS, Aim, Lengths, fell_into, measure, newest, said, strike
from tests.faults.runs import Run, Unfinished, finished
from tests.faults.scene import Scene

FORMS = ("merged", "adapter")


@dataclass(frozen=True)
class Reference:
    """What trials are held against: runs that were never stopped, and what became of them.

    Attributes:
        whole: as the trials are.
        keeper: the same run, keeping all of its checkpoints.
        exports: the folder of `whole`'s exports, by form.
    """

    scene: Scene
    kind: str
    whole: Run
    keeper: Run
    exports: Path
    lengths: Lengths


@dataclass
class Instant:
    """One kill: what was aimed at, and what it fell into."""

    trial: int
    aim: Aim
    phase: str
    part: str
    step: int


@dataclass
class Outcome:
    """What a trial found; each list holds a line for each fault."""

    instants: list[Instant] = field(default_factory=list)
    damaged_checkpoints: list[str] = field(default_factory=list)
    wrong_caches: list[str] = field(default_factory=list)
    lines_lost_or_doubled: list[str] = field(default_factory=list)
    other_bits: list[str] = field(default_factory=list)

    def damage(self) -> dict[str, list[str]]:
        return {name: value for name, value in asdict(self).items() if name != "instants"}


def make_reference(folder: Path, start: Start, kind: str = "lora", **scene: Any) -> Reference:
    """Make the scene and the runs that are never stopped."""
    made = Scene(folder / "scene", **scene)
    whole = Run(made, folder / "whole", start, kind)
    command = whole.go()
    lengths = measure(whole, command)
    finished(command)
    keeper = Run(made, folder / "keeper", start, kind, training={"save_total_limit": None})
    keeper.finish()
    for form in FORMS:
        lengths.add(f"export {form}", _seconds_to_export(whole.export(folder / "exports" / form, form)))
    return Reference(made, kind, whole, keeper, folder / "exports", lengths)


def _seconds_to_export(command: Command) -> float:
    command.until(lambda: said(command, "export"))
    begun = time.monotonic()
    finished(command)
    return time.monotonic() - begun


def draw(chance: random.Random, wanted: Mapping[str, int]) -> list[Aim]:
    """The kills of one trial, in the order of a run's phases, from how many of each are still wanted."""

    def aims(phase: str, most: int, nth: int) -> Iterator[Aim]:
        for _ in range(min(most, max(0, wanted.get(phase, 0)))):
            yield Aim(phase, chance.randint(1, nth), chance.random())

    aimed = [aim for aim in aims("tokenise", chance.randint(1, 3), 1)]
    between = [*aims("train", 2, 6), *aims("evaluate", 2, 2)]
    parts = [part for part in SAVE_PARTS if wanted.get(part, 0) > 0]
    anywhere = wanted.get("save", 0) > 0
    for number in range(min(6, max(0, wanted.get("save", 0), sum(wanted[part] for part in parts)))):
        if parts and (number % 2 or not anywhere):
            # These two are over in milliseconds, and the kill itself takes one.
            part = chance.choice(parts)
            short = part in ("rename", "retention")
            between.append(Aim("save", 1, 0.3 * chance.random() if short else chance.random(), part))
        else:
            between.append(Aim("save", chance.randint(1, 2), chance.random()))
    chance.shuffle(between)
    return [*aimed, *between, *aims("export", 2, 1)]


def trial(reference: Reference, start: Start, number: int, aims: list[Aim], place: Path) -> Outcome:
    """A run from its beginning to its export, killed where the aims say."""
    outcome = Outcome()
    run = Run(reference.scene, place, start, reference.kind)
    caches = len(reference.whole.caches())
    expected = 0  # the checkpoint to go on from
    for aim in aims:
        if aim.phase == "export":
            continue
        command = run.go()
        if strike(run, command, aim, reference.lengths):
            outcome.instants.append(Instant(number, aim, *fell_into(run, command, caches), step=run.logged()))
        elif command.code != 0:
            outcome.other_bits.append(f"exit code {command.code}: {command.text()[-1000:]}")
            return outcome
        _examine(reference, run, outcome)
        _check_begin(command, expected, outcome)
        expected = newest(run)
    try:
        _check_begin(run.finish(), expected, outcome)
        outcome.other_bits += differences(reference.whole.folder, run.folder)
        _examine(reference, run, outcome)
        outcome.wrong_caches += [str(path) for path in run.cache.rglob(".*")]
        lost = lines_lost_or_doubled(reference.whole.folder, run.folder)
        outcome.lines_lost_or_doubled += [f"{lost} in the end"] if lost else []
        _export(reference, run, number, [aim for aim in aims if aim.phase == "export"], outcome)
    except Unfinished as error:
        outcome.other_bits.append(str(error)[-1000:])
    return outcome


def _examine(reference: Reference, run: Run, outcome: Outcome) -> None:
    """What has to hold after a kill already."""
    outcome.damaged_checkpoints += damaged_checkpoints(reference.keeper.folder, run.folder)
    outcome.wrong_caches += wrong_caches(reference.whole.cache, run.cache)
    if run.checkpoints():
        lost = lines_lost_or_doubled(reference.whole.folder, run.folder, up_to=newest(run))
        outcome.lines_lost_or_doubled += [f"{lost} up to {newest(run)}"] if lost else []


def _check_begin(command: Command, expected: int, outcome: Outcome) -> None:
    """A command goes on from the newest checkpoint that its run had."""
    lines = command.lines()
    went_on = [line for line in lines if line.startswith(("going on from", "there is no checkpoint", "all "))]
    if any("is passed over" in line for line in lines):
        outcome.damaged_checkpoints.append(next(line for line in lines if "is passed over" in line))
    if expected and went_on and not went_on[0].startswith("all ") and not went_on[0].endswith(f"checkpoint-{expected}"):
        outcome.damaged_checkpoints.append(f"{went_on[0]}, not from {expected}")


def _export(reference: Reference, run: Run, number: int, aims: list[Aim], outcome: Outcome) -> None:
    """An export is not there, or whole; and a second one succeeds."""
    form = FORMS[number % len(FORMS)]
    whole, output = reference.exports / form, run.place / "export" / form
    lengths = Lengths({"export": reference.lengths.seconds[f"export {form}"]})
    for aim in aims:
        shutil.rmtree(output, ignore_errors=True)
        command = run.export(output, form)
        if strike(run, command, aim, lengths):
            outcome.instants.append(Instant(number, aim, "export", "", step=run.logged()))
        if output.exists():
            outcome.other_bits += [f"export: {line}" for line in differences(whole, output)]
    shutil.rmtree(output, ignore_errors=True)
    finished(run.export(output, form))
    outcome.other_bits += [f"export: {line}" for line in differences(whole, output)]
    outcome.other_bits += [f"export: {path} was left" for path in output.parent.glob(".*")]
