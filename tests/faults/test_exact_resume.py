"""A run that was killed at random, several times, and gone on with ends in the bits of one that was never stopped.

The real command in processes of its own. Each kind of run is killed at a random step, inside a save, in an evaluation
and at a random step again; all have dropout, two epochs, mixed sources and three micro-batches a step.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steep.manifest import write_manifest
from steep.training.state_files import load_state
from tests.faults.command import ForkServer, start_real
from tests.faults.compare import differences, lines_lost_or_doubled, wrong_caches
from tests.faults.instants import Aim, Lengths, measure, newest, strike
from tests.faults.runs import Run, finished
from tests.faults.scene import KINDS, Scene
from tests.training.helpers import save_state

_OTHER: dict[str, Callable[[], Any]] = {
    "python": lambda: random.Random(1).getstate(),
    "numpy": lambda: ("MT19937", torch.arange(624), 3, 0, 0.0),
    "torch": lambda: torch.Generator().manual_seed(1).get_state(),
}


def draw() -> random.Random:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")  # pytest shows it where the test fails
    return random.Random(seed)


def stop_in_a_save(run: Run, lengths: Lengths, chance: random.Random) -> None:
    for _ in range(6):
        assert strike(run, run.go(), Aim("save", 1, 0.6 * chance.random(), "write"), lengths)
        if run.staging():
            return
    raise AssertionError("no kill fell inside a save")


def assert_same(whole: Run, stopped: Run) -> None:
    assert differences(whole.folder, stopped.folder) == []
    assert lines_lost_or_doubled(whole.folder, stopped.folder) == 0
    assert wrong_caches(whole.cache, stopped.cache) == []


@pytest.fixture(scope="module")
def never_stopped(
    scene: Scene, quick: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Run, Lengths]]:
    """Gives a kind's run that was not stopped, with its times."""

    @cache
    def made(kind: str) -> tuple[Run, Lengths]:
        # In one kind by `python -m steep`: sets have another order in each process, and in a fork that of its parent.
        run = Run(
            scene, tmp_path_factory.mktemp("never-stopped") / "place", start_real if kind == "lora" else quick, kind
        )
        command = run.go()
        lengths = measure(run, command)
        finished(command)
        return run, lengths

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again_it_ends_in_the_same_bits(
    kind: str, never_stopped: Callable[[str], tuple[Run, Lengths]], scene: Scene, quick: ForkServer, tmp_path: Path
) -> None:
    chance = draw()
    whole, lengths = never_stopped(kind)
    assert whole.last_step == 20 and whole.logged() == 18 and whole.scored_steps() >= {0, 12, 20}
    stopped = Run(scene, tmp_path / "stopped", quick, kind)
    assert strike(stopped, stopped.go(), Aim("train", chance.randint(1, 9), chance.random()), lengths)
    stop_in_a_save(stopped, lengths, chance)
    assert strike(stopped, stopped.go(), Aim("evaluate", chance.randint(1, 2), chance.random()), lengths)
    further = chance.randint(1, whole.logged() - newest(stopped))
    assert strike(stopped, stopped.go(), Aim("train", further, chance.random()), lengths)
    stopped.finish()
    assert_same(whole, stopped)
    best = {whole.best_step("heldout", range(4, 21, 4))} if kind == "qlora" else set()  # stays, too
    assert whole.checkpoints() == sorted({*best, 16, 20})
    states = load_file(whole.folder / f"checkpoint-{whole.last_step}" / "optimizer.safetensors").values()
    assert ("torch.uint8" in {str(state.dtype) for state in states}) == ("8-bit" in kind)


@pytest.mark.parametrize("generator", ["python", "numpy", "torch"])
def test_a_random_state_that_differs_is_found(
    generator: str, never_stopped: Callable[[str], tuple[Run, Lengths]], scene: Scene, quick: ForkServer, tmp_path: Path
) -> None:
    """Killed, and gone on with from a checkpoint in which one generator is in another state."""
    whole, lengths = never_stopped("lora")
    stopped = Run(scene, tmp_path / "stopped", quick, "lora")
    assert strike(stopped, stopped.go(), Aim("train", 18, 0.0), lengths)
    checkpoint = stopped.folder / f"checkpoint-{stopped.checkpoints()[-1]}"
    [state] = load_state(checkpoint, "random")  # of the one process
    save_state([state | {generator: _OTHER[generator]()}], checkpoint, "random")
    write_manifest(checkpoint)  # else it would be passed over
    stopped.finish()
    found = differences(whole.folder, stopped.folder)
    assert any("random" in line for line in found)
    # Dropout draws from torch's.
    assert any("final/adapter_model" in line for line in found) == (generator == "torch")
    assert (lines_lost_or_doubled(whole.folder, stopped.folder) > 0) == (generator == "torch")
