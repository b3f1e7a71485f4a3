"""A sample of the fault-injection suite; `make faults` is all of it."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict
from pathlib import Path

from tests.faults.command import ForkServer
from tests.faults.suite import Tally, result
from tests.faults.trials import Outcome, draw, make_reference, trial

WANTED = {"tokenise": 2, "train": 2, "save": 4, "evaluate": 2, "export": 2}


def test_killed_in_each_phase_nothing_is_damaged(quick: ForkServer, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")  # pytest shows it where the test fails
    reference = make_reference(tmp_path, quick, "lora 8-bit")
    tally = Tally(WANTED, parts_wanted=0)
    while tally.goes_on() and tally.trials < 5:
        tally.trials += 1
        aims = draw(random.Random(f"{seed} {tally.trials}"), tally.missing())
        tally.outcomes.append(trial(reference, quick, tally.trials, aims, tmp_path / str(tally.trials)))
    assert tally.damage() == Outcome().damage()
    assert tally.is_complete(), tally.table()


def test_damage_is_counted_and_written_down() -> None:
    tally = Tally({"tokenise": 0, "train": 0, "save": 0, "evaluate": 0, "export": 0}, parts_wanted=0)
    tally.outcomes = [Outcome(wrong_caches=["x.arrow"]), Outcome(other_bits=["a", "b"])]
    assert {name: len(lines) for name, lines in tally.damage().items()} == {
        "damaged_checkpoints": 0, "wrong_caches": 1, "lines_lost_or_doubled": 0, "other_bits": 2,
    }  # fmt: skip
    written = json.loads(json.dumps(result(tally, 1, 2.0, ["suite"])))
    assert written["damage"]["other_bits"] == 2 and written["instants"] == 0
    assert set(asdict(Outcome())) - {"instants"} == set(written["damage"])
