"""The comparison of two runs finds each kind of damage in real files, and nothing where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.command import ForkServer
from tests.faults.compare import damaged_checkpoints, differences, lines_lost_or_doubled, wrong_caches
from tests.faults.runs import Run
from tests.faults.scene import Scene


@pytest.fixture(scope="module")
def whole(scene: Scene, quick: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of a finished run."""
    run = Run(scene, tmp_path_factory.mktemp("whole") / "place", quick)
    run.finish()
    return run.place


def flip_a_byte(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def edit_line(file: Path, number: int, edit: Callable[[list[str], int], Any]) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    edit(lines, number)
    file.write_text("".join(lines), encoding="utf-8")


def raise_loss(lines: list[str], number: int) -> None:
    row = json.loads(lines[number])
    lines[number] = json.dumps({**row, "loss": row["loss"] + 1e-12}) + "\n"


DAMAGE: dict[str, Callable[[Path], None]] = {
    "final/adapter_model.safetensors": lambda run: flip_a_byte(run / "final" / "adapter_model.safetensors"),
    "checkpoint-20/optimizer.safetensors": lambda run: flip_a_byte(run / "checkpoint-20" / "optimizer.safetensors"),
    "checkpoint-20/random.safetensors": lambda run: flip_a_byte(run / "checkpoint-20" / "random.safetensors"),
    "checkpoint-20/observations.json": lambda run: (run / "checkpoint-20" / "observations.json").unlink(),
    "ledger.json": lambda run: flip_a_byte(run / "ledger.json", (run / "ledger.json").read_bytes().index(b"rows") - 3),
    "metrics.jsonl": lambda run: edit_line(run / "metrics.jsonl", 4, raise_loss),
    "samples.jsonl": lambda run: edit_line(run / "samples.jsonl", 0, lambda lines, number: lines.pop(number)),
    "evaluation.jsonl": lambda run: edit_line(
        run / "evaluation.jsonl", 1, lambda lines, number: lines.insert(number, lines[number])
    ),
    ".writing-host-1-2": lambda run: (run / ".writing-host-1-2").mkdir(),
}


def test_two_copies_do_not_differ(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    copy = tmp_path / "copy"
    assert differences(whole / "run", copy / "run", named=whole / "run") == []
    assert damaged_checkpoints(whole / "run", copy / "run", named=whole / "run") == []
    assert lines_lost_or_doubled(whole / "run", copy / "run") == 0
    assert wrong_caches(whole, copy) == []


@pytest.mark.parametrize("what", DAMAGE)
def test_each_kind_of_damage_is_found(what: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    DAMAGE[what](run)
    found = differences(whole / "run", run, named=whole / "run")
    assert found and all(line.startswith(what) for line in found)
    assert bool(damaged_checkpoints(whole / "run", run, named=whole / "run")) == what.startswith("checkpoint")
    assert lines_lost_or_doubled(whole / "run", run) == (what in ("metrics.jsonl", "samples.jsonl", "evaluation.jsonl"))


def test_a_wrong_cache_is_found(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "cache", tmp_path / "cache")
    file = min((tmp_path / "cache").rglob("*.arrow"))
    flip_a_byte(file, 2000)
    assert wrong_caches(whole, tmp_path) == [file.name]
