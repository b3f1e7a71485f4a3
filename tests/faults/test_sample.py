"""A sample of the fault-injection suite; `make faults` is all of it."""

from __future__ import annotations

import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import suite
from tests.faults.command import ForkServer
from tests.faults.instants import PHASES, Aim
from tests.faults.suite import Tally
from tests.faults.trials import Instant, Outcome, draw, make_reference, trial

WANTED = {"tokenise": 2, "train": 2, "save": 4, "evaluate": 2, "export": 2}


@pytest.mark.timeout(600)
def test_killed_in_each_phase_nothing_is_damaged(quick: ForkServer, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")  # pytest shows it where the test fails
    reference = make_reference(tmp_path, quick, "lora 8-bit")
    tally = Tally(WANTED, parts_wanted=0)
    while tally.goes_on() and tally.trials < 12:  # a busy machine is late for what takes 70 ms
        tally.trials += 1
        aims = draw(random.Random(f"{seed} {tally.trials}"), tally.missing())
        tally.outcomes.append(trial(reference, quick, tally.trials, aims, tmp_path / str(tally.trials)))
    assert tally.damage() == Outcome().damage()
    assert tally.is_complete(), tally.table()


@pytest.mark.parametrize(
    ("wrong", "kills", "says"),
    [([], 10, None), (["x.arrow"], 10, "there is damage"), ([], 9, "not every phase was hit as often as wanted")],
)
def test_what_the_suite_says_and_writes(
    wrong: list[str],
    kills: int,
    says: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def inject(folder: Path, seed: int, **settings: Any) -> Tally:
        tally = Tally(dict.fromkeys(PHASES, 2), parts_wanted=0)
        fallen = [phase for phase in PHASES for _ in range(2)][:kills]
        instants = [Instant(1, Aim(phase, 1, 0.5), phase, "sync" if phase == "save" else "", 3) for phase in fallen]
        tally.outcomes = [Outcome(instants, wrong_caches=wrong)]
        return tally

    monkeypatch.setattr(suite, "inject", inject)
    monkeypatch.setattr(sys, "argv", ["suite", "--seed", "3", "--output", str(tmp_path / "results")])
    if says is None:
        suite.main()
    else:
        with pytest.raises(SystemExit, match=says):
            suite.main()
    (file,) = (tmp_path / "results").glob("faults-*.json")
    written = json.loads(file.read_text(encoding="utf-8"))
    assert (written["seed"], written["instants"], written["parts_of_a_save"]["sync"]) == (3, kills, 2)
    assert written["damage"] == {**dict.fromkeys(Outcome().damage(), 0), "wrong_caches": len(wrong)}
    assert len(written["kills"]) == kills and written["kills"][0]["aim"]["phase"] == "tokenise"
    table = capsys.readouterr().out
    assert re.search(rf"^all +{kills}$", table, re.MULTILINE)
    assert re.search(rf"^wrong caches +{len(wrong)}$", table, re.MULTILINE)
