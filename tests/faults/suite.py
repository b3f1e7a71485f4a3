"""The fault-injection suite: kill the real command at many instants, go on, and count what is damaged.

Trials (`trials.py`) are drawn until each phase of a run was hit as often as wanted. `make faults` is all of it; the
tests take a sample.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.faults.command import ForkServer, Start, start_real
from tests.faults.instants import PHASES, SAVE_PARTS, Aim
from tests.faults.trials import Instant, Outcome, Reference, draw, make_reference, trial

WANTED = {"tokenise": 24, "train": 40, "save": 90, "evaluate": 30, "export": 30}
PARTS_WANTED = 12  # of each part of a save
_MOST_TRIALS = 80


@dataclass
class Tally:
    """What all trials found so far."""

    wanted: dict[str, int]
    parts_wanted: int
    trials: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    def instants(self) -> list[Instant]:
        return [instant for outcome in self.outcomes for instant in outcome.instants]

    def missing(self) -> dict[str, int]:
        """How many hits are still wanted, by phase and by part of a save."""
        phases = Counter(instant.phase for instant in self.instants())
        parts = Counter(instant.part for instant in self.instants())
        return {
            **{phase: self.wanted[phase] - phases[phase] for phase in PHASES},
            **{part: self.parts_wanted - parts[part] for part in SAVE_PARTS},
        }

    def is_complete(self) -> bool:
        return max(self.missing().values()) <= 0

    def goes_on(self) -> bool:
        return not self.is_complete() and self.trials < _MOST_TRIALS

    def damage(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for outcome in self.outcomes:
            for name, lines in outcome.damage().items():
                found.setdefault(name, []).extend(lines)
        return found

    def table(self) -> str:
        instants = self.instants()
        phases = Counter(instant.phase for instant in instants)
        parts = Counter(instant.part for instant in instants)
        rows = [f"{phase:<28}{phases[phase]:>6}" for phase in (*PHASES, "start")]
        rows[PHASES.index("save") + 1 : PHASES.index("save") + 1] = [
            f"  {part:<26}{parts[part]:>6}" for part in SAVE_PARTS
        ]
        damage = [f"{name.replace('_', ' '):<28}{len(lines):>6}" for name, lines in self.damage().items()]
        return "\n".join([f"{'killed in':<28}{'times':>6}", *rows, f"{'all':<28}{len(instants):>6}", "", *damage])


_start: Start = start_real


def _begin_worker(forked: bool) -> None:
    global _start
    if forked:
        _start = ForkServer()


def _work(reference: Reference, number: int, aims: list[Aim], place: Path) -> Outcome:
    return trial(reference, _start, number, aims, place)


def inject(
    folder: Path,
    seed: int,
    *,
    workers: int = 2,
    forked: bool = False,
    wanted: Mapping[str, int] = WANTED,
    parts_wanted: int = PARTS_WANTED,
) -> Tally:
    """Draw trials until every phase was hit as often as wanted. What a trial with damage left stays in the folder.

    Args:
        workers: trials side by side.
        forked: start the command by a fork, not as `python -m steep`.
    """
    begun = time.monotonic()
    server = ForkServer() if forked else None
    reference = make_reference(folder, server or start_real, hidden_size=256, long=True)
    if server is not None:
        server.close()
    say(f"the runs that are never stopped took {time.monotonic() - begun:.0f} s")
    for name, seconds in sorted(reference.lengths.seconds.items()):
        say(f"  {name}: {reference.lengths.of(name) * 1000:.1f} ms ({len(seconds)} times)")
    tally = Tally(dict(wanted), parts_wanted)
    begun = time.monotonic()
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, (forked,)) as pool:
        running: dict[Future[Outcome], Path] = {}
        while running or tally.goes_on():
            while len(running) < workers and tally.goes_on():
                tally.trials += 1
                place = folder / f"trial-{tally.trials}"
                aims = draw(random.Random(f"{seed} {tally.trials}"), tally.missing())
                running[pool.submit(_work, reference, tally.trials, aims, place)] = place
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                _take(tally, done.result(), running.pop(done), time.monotonic() - begun)
    return tally


def _take(tally: Tally, outcome: Outcome, place: Path, seconds: float) -> None:
    tally.outcomes.append(outcome)
    faults = [f"{name.replace('_', ' ')}: {line}" for name, lines in outcome.damage().items() for line in lines]
    if faults:
        say("\n".join(f"{place.name}: {fault}" for fault in faults[:10]))
    else:
        shutil.rmtree(place)
    left, done = sum(max(0, tally.missing()[phase]) for phase in PHASES), len(tally.instants())
    say(f"{done} instants, {left} to go, about {seconds / max(done, 1) * left / 60:.0f} min left")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def result(tally: Tally, seed: int, seconds: float, command: list[str]) -> dict[str, Any]:
    """What `--output` writes."""
    instants = tally.instants()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": command,
        "seed": seed,
        "seconds": round(seconds),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "packages": {name: version(name) for name in ("steep", "torch", "transformers", "peft", "safetensors")},
        "trials": tally.trials,
        "instants": len(instants),
        "phases": {phase: sum(instant.phase == phase for instant in instants) for phase in (*PHASES, "start")},
        "parts_of_a_save": {part: sum(instant.part == part for instant in instants) for part in SAVE_PARTS},
        "damage": {name: len(lines) for name, lines in tally.damage().items()},
        "damage_lines": tally.damage(),
        "kills": [asdict(instant) for instant in instants],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=1, help="of the draws; when a process dies differs all the same")
    parser.add_argument("--workers", type=int, default=2, help="trials side by side, each on one core")
    parser.add_argument(
        "--forked", action="store_true", help="start the command by a fork with its imports done: quicker"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the kills; 1 is all of them")
    parser.add_argument("--output", type=Path, help="folder for a dated JSON file with all figures")
    given = parser.parse_args()
    wanted = {phase: max(1, round(count * given.share)) for phase, count in WANTED.items()}
    folder = Path(tempfile.mkdtemp(prefix="steep-faults-"))
    begun = time.monotonic()
    tally = inject(
        folder,
        given.seed,
        workers=given.workers,
        forked=given.forked,
        wanted=wanted,
        parts_wanted=round(PARTS_WANTED * given.share),
    )
    print(tally.table())
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        file = given.output / f"faults-{time.strftime('%Y-%m-%d-%H%M%S')}.json"
        tree = result(tally, given.seed, time.monotonic() - begun, sys.argv)
        file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {file}")
    if any(tally.damage().values()):
        sys.exit(f"there is damage; what the trials left is in {folder}")
    shutil.rmtree(folder)
    if not tally.is_complete():
        sys.exit(f"not every phase was hit as often as wanted: {tally.missing()}")


if __name__ == "__main__":
    main()
