"""The checkpoints of a run: which there are, which of them are whole, and the random state they keep."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState

from steep import ranks
from steep.errors import UserError
from steep.manifest import Damaged, verify
from steep.model.choices import Choices
from steep.recorded import parsed
from steep.training.state_files import from_bytes, to_bytes

logger = logging.getLogger("steep")

STATES = ("optimizer", "schedule", "random", "observations")
FORMAT = 4  # another number as soon as a resumed run reads what checkpoints so far lack, or reads it otherwise
FORMAT_FILE = "format.json"
CHOICES_FILE = "choices.json"
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
        format: as `FORMAT` was; 0 from before there were numbers.
        written_by: the version of steep that wrote it, if it says so.
        transformers: the version of transformers that it was written under, if it says so.
        unknown: fields of its trainer_state.json that the transformers here does not have.
        files: the files that belong to it; nothing else in the folder may be read.
        extra: names of those that do not.
    """

    path: Path
    step: int
    digest: str
    format: int
    written_by: str | None
    transformers: str | None
    unknown: tuple[str, ...]
    files: frozenset[str]
    extra: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The newest checkpoint of a run that is whole, if there is one, and the newer ones that are not, with reasons."""

    checkpoint: Checkpoint | None
    passed_over: tuple[tuple[Path, str], ...]

    def say_passed_over(self) -> None:
        for path, reason in self.passed_over:
            logger.warning("%s is passed over: %s. It is left as it is", path, reason)


def checkpoints(run_dir: Path) -> list[Path]:
    """What bears the name of a checkpoint in a run folder, whole or not, oldest step first."""
    if not run_dir.is_dir():
        return []
    return sorted((path for path in run_dir.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def format_text() -> str:
    """What a checkpoint's `format.json` says: the format, and the versions of steep and transformers."""
    return json.dumps({"format": FORMAT, "steep": version("steep"), "transformers": version("transformers")}) + "\n"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("checkpoint-"))


def inspect(path: Path) -> Checkpoint:
    """Read a checkpoint whole, and compare it with its manifest.

    Raises:
        Damaged: it is not what was written, or no checkpoint of steep's.
        OSError: it cannot be read, and may be whole.
    """
    manifest, extra = verify(path)
    weights = [name for name in manifest.files if name.endswith("model.safetensors") or name.startswith("model-")]
    missing = [name for name in _NEEDED if name not in manifest.files]
    if missing or not weights:
        raise Damaged(f"it lacks {missing[0] if missing else 'the weights'}")
    state = _read(path, "trainer_state.json")
    step, unknown = state["global_step"], sorted(state.keys() - {field.name for field in fields(TrainerState)})
    if not unknown:
        _check_state(path)
    _read(path, "training_args.json")
    if _NAME.fullmatch(path.name) and step != step_of(path):
        raise Damaged(f"it holds step {step}")
    written: dict[str, Any] = _read(path, FORMAT_FILE) if FORMAT_FILE in manifest.files else {"format": 0}
    if written["format"] == FORMAT:  # older ones have none
        if CHOICES_FILE not in manifest.files:
            raise Damaged(f"it lacks {CHOICES_FILE}")
        _read(path, CHOICES_FILE)
    return Checkpoint(
        path,
        step,
        manifest.digest,
        written["format"],
        written.get("steep"),
        written.get("transformers"),
        tuple(unknown),
        frozenset(manifest.files),
        tuple(extra),
    )


def _read(path: Path, name: str) -> dict[str, Any]:
    """A JSON file that is read again."""
    try:
        return parsed(path / name, nan=True)
    except ValueError as error:
        raise Damaged(f"{name} cannot be read: {error}") from error


def _check_state(path: Path) -> None:
    try:
        TrainerState.load_from_json(str(path / "trainer_state.json"))
    except (ValueError, TypeError) as error:
        raise Damaged(f"trainer_state.json cannot be read: {error}") from error


def read_choices(checkpoint: Path, field: str = "--resume") -> Choices:
    """What was chosen for the model of a checkpoint that was verified.

    Raises:
        UserError: it cannot be read.
    """
    try:
        tree = parsed(checkpoint / CHOICES_FILE)
    except (ValueError, OSError) as error:
        problem = f"{checkpoint} is damaged: {CHOICES_FILE}: {error}"
        raise UserError(field, problem, "Give another checkpoint, or delete that one.") from error
    return Choices(**{each.name: tree[each.name] for each in fields(Choices) if each.name in tree})


def refuse_other_format(checkpoint: Checkpoint, field: str) -> None:
    """Check that a checkpoint holds what this version reads.

    Raises:
        UserError: another version of steep wrote it, in another format, or another transformers, with more fields.
    """
    if checkpoint.format == FORMAT and not checkpoint.unknown:
        return
    if checkpoint.format == FORMAT:
        there = checkpoint.transformers or "another version, which environment.json of its run names"
        raise UserError(
            field,
            f"{checkpoint.path} was written under transformers {there}; here is transformers "
            f"{version('transformers')}, which does not know {', '.join(checkpoint.unknown)} of its trainer_state.json",
            "Go on with the version that it was written under, or begin a new run with this one.",
        )
    writer = f"steep {checkpoint.written_by}" if checkpoint.written_by else "an older steep"
    raise UserError(
        field,
        f"{checkpoint.path} was written by {writer} (format {checkpoint.format}), and this is steep "
        f"{version('steep')}, which reads format {FORMAT}",
        "Go on with the version that wrote it, or begin a new run with this one.",
    )


def newest_valid(run_dir: Path, *, up_to: int | None = None, field: str = "--resume") -> Choice:
    """The checkpoint that a run goes on from.

    Args:
        up_to: look at no later step.

    Raises:
        UserError: another version of steep or of transformers wrote it, see `refuse_other_format`; or one that would be
            the newest cannot be read: whether it is whole is not known.
    """
    passed_over: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(run_dir)):
        if up_to is not None and step_of(path) > up_to:
            continue
        try:
            checkpoint = inspect(path)
        except Damaged as damage:
            passed_over.append((path, str(damage)))
            continue
        except OSError as error:
            raise _unreadable(error, path, field) from error
        refuse_other_format(checkpoint, field)
        return Choice(checkpoint, tuple(passed_over))
    return Choice(None, tuple(passed_over))


def choose(run_dir: Path, field: str = "--resume") -> Checkpoint | None:
    """`newest_valid`, with a log line for each that was passed over; None where there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints, and none is whole; another version wrote the newest one; or it cannot be read.
    """
    return found_by_main(lambda: _choose(run_dir, field))


def found_by_main(find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What the first of several processes finds, for all of them: one reads the files."""
    found = ranks.from_main(lambda: _as_json(find()))
    return None if found is None else _from_json(found)


def _as_json(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    if checkpoint is None:
        return None
    return {**asdict(checkpoint), "path": str(checkpoint.path), "files": sorted(checkpoint.files)}


def _from_json(tree: dict[str, Any]) -> Checkpoint:
    path, files = Path(tree["path"]), frozenset(tree["files"])
    names = {name: tuple(tree[name]) for name in ("extra", "unknown")}
    return Checkpoint(**{**tree, "path": path, "files": files, **names})


def _choose(run_dir: Path, field: str) -> Checkpoint | None:
    choice = newest_valid(run_dir, field=field)
    if choice.checkpoint is None:
        if choice.passed_over:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in choice.passed_over)
            raise UserError(
                field,
                f"no checkpoint of {run_dir} is whole ({reasons})",
                "Put one back from a copy, or delete them: the run then begins at its start.",
            )
        return None
    choice.say_passed_over()
    _name_extra(choice.checkpoint)
    return choice.checkpoint


def given(path: str | Path, field: str) -> Checkpoint:
    """The checkpoint at a path that somebody gave.

    Raises:
        UserError: it is not whole, cannot be read, or another version wrote it.
    """
    try:
        checkpoint = inspect(Path(path))
    except Damaged as damage:
        raise UserError(field, f"{path} is no whole checkpoint: {damage}", "Give another checkpoint.") from damage
    except OSError as error:
        raise _unreadable(error, Path(path), field) from error
    refuse_other_format(checkpoint, field)
    _name_extra(checkpoint)
    return checkpoint


def _unreadable(error: OSError, path: Path, field: str) -> UserError:
    return UserError(
        field,
        f"{error.filename or path} cannot be read ({error.strerror}), so whether {path.name} is whole is not known",
        f"Mend its permissions or the disk, and start again; or move {path} away to do without it.",
    )


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
    """State of every random generator that training draws from: Python, numpy, torch on the CPU and on its card."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.random.get_rng_state(),
        # A machine may show more cards than the run takes, and fewer when it goes on.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` took."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
