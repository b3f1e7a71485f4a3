"""The checkpoints of a run: which there are, which of them are whole, and the random state they keep."""

from __future__ import annotations

import json
import logging
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steep import ranks
from steep.errors import UserError
from steep.manifest import Damaged, verify
from steep.training.state_files import from_bytes, to_bytes

logger = logging.getLogger("steep")

STATES = ("optimizer", "schedule", "random", "observations")
_NEEDED = (
    "trainer_state.json",
    "training_args.json",
    *(f"{name}.{ending}" for name in STATES for ending in ("json", "safetensors")),
)
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found to be as it was written.

    Attributes:
        step: optimizer steps done.
        digest: SHA-256 of its manifest, and through it of every file.
        files: the files that belong to it; nothing else in the folder may be read.
        extra: names of those that do not.
    """

    path: Path
    step: int
    digest: str
    files: frozenset[str]
    extra: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The newest checkpoint of a run that is whole, if there is one, and the newer ones that are not, with reasons."""

    checkpoint: Checkpoint | None
    passed_over: tuple[tuple[Path, str], ...]


def checkpoints(run_dir: Path) -> list[Path]:
    """What bears the name of a checkpoint in a run folder, whole or not, oldest step first."""
    if not run_dir.is_dir():
        return []
    return sorted((path for path in run_dir.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("checkpoint-"))


def inspect(path: Path) -> Checkpoint:
    """Read a checkpoint whole, and compare it with its manifest.

    Raises:
        Damaged: it is not what was written, or no checkpoint of steep's.
    """
    manifest, extra = verify(path)
    weights = [name for name in manifest.files if name.endswith("model.safetensors") or name.startswith("model-")]
    missing = [name for name in _NEEDED if name not in manifest.files]
    if missing or not weights:
        raise Damaged(f"it lacks {missing[0] if missing else 'the weights'}")
    try:
        step = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged("trainer_state.json names no step") from error
    if _NAME.fullmatch(path.name) and step != step_of(path):
        raise Damaged(f"it holds step {step}")
    return Checkpoint(path, step, manifest.digest, frozenset(manifest.files), tuple(extra))


def newest_valid(run_dir: Path, *, up_to: int | None = None) -> Choice:
    """The checkpoint that a run goes on from.

    Args:
        up_to: look at no later step.
    """
    passed_over: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(run_dir)):
        if up_to is not None and step_of(path) > up_to:
            continue
        try:
            return Choice(inspect(path), tuple(passed_over))
        except Damaged as damage:
            passed_over.append((path, str(damage)))
    return Choice(None, tuple(passed_over))


def choose(run_dir: Path, field: str = "--resume") -> Checkpoint | None:
    """`newest_valid`, with a log line for each that was passed over; None where there is no checkpoint at all. The
    first of several processes chooses for all.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    found = ranks.from_main(lambda: _as_json(_choose(run_dir, field)))
    return None if found is None else _from_json(found)


def _as_json(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    return {**asdict(checkpoint), "path": str(checkpoint.path), "files": sorted(checkpoint.files)}


def _from_json(fields: dict[str, Any]) -> Checkpoint:
    path, files, extra = Path(fields["path"]), frozenset(fields["files"]), tuple(fields["extra"])
    return Checkpoint(**{**fields, "path": path, "files": files, "extra": extra})


def _choose(run_dir: Path, field: str) -> Checkpoint | None:
    choice = newest_valid(run_dir)
    if choice.checkpoint is None:
        if choice.passed_over:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in choice.passed_over)
            raise UserError(
                field,
                f"no checkpoint of {run_dir} is whole ({reasons})",
                "Put one back from a copy, or delete them: the run then begins at its start.",
            )
        return None
    for path, reason in choice.passed_over:
        logger.warning("%s is passed over: %s. It is left as it is", path, reason)
    _name_extra(choice.checkpoint)
    return choice.checkpoint


def given(path: str | Path, field: str) -> Checkpoint:
    """The checkpoint at a path that somebody gave.

    Raises:
        UserError: it is not whole.
    """
    try:
        checkpoint = inspect(Path(path))
    except Damaged as damage:
        raise UserError(field, f"{path} is no whole checkpoint: {damage}", "Give another checkpoint.") from damage
    _name_extra(checkpoint)
    return checkpoint


def _name_extra(checkpoint: Checkpoint) -> None:
    for name in checkpoint.extra:
        logger.warning("%s holds %r, which was not saved with it; it is not read", checkpoint.path, name)


def rng_states() -> list[dict[str, Any]]:
    """`rng_state` of every process, by rank; every process has to call it."""
    return [from_bytes(state) for state in ranks.gathered_bytes(to_bytes(rng_state()))]


def own_rng_state(states: list[dict[str, Any]]) -> dict[str, Any]:
    """This process's own of `rng_states`.

    Raises:
        UserError: there were more or fewer processes.
    """
    ranks.refuse_other_number(len(states), "--resume")
    return states[ranks.rank()]


def rng_state() -> dict[str, Any]:
    """State of every random generator that training draws from: Python, numpy, torch on the CPU and on each GPU."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` took."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
