"""A branch: a new run that goes on from a checkpoint of another one, its parent."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from steep.errors import UserError
from steep.training.state_files import load_state

_STATES = ("optimizer", "schedule", "random", "observations")
_TENSORS = ("adapter_model.safetensors", *(f"{name}.safetensors" for name in _STATES))
_NEEDED = (*_TENSORS, *(f"{name}.json" for name in _STATES), "trainer_state.json")


@dataclass(frozen=True)
class Branch:
    """Where a branch leaves its parent. `parent.json` of its run folder.

    Attributes:
        checkpoint: absolute path of the parent's checkpoint.
        step: the parent's step there; the branch counts on from it.
        digest: SHA-256 of the checkpoint, see `digest_of`.
        rate_factor: what the parent's schedule multiplied its peak rates by, for the step that came next.
        data_start: the step at which the epochs of the parent's text began: 0, or where it was a branch itself.
        fingerprint: of the parent's rows (`Corpus.fingerprint`); None without a `Corpus`.
    """

    checkpoint: str
    step: int
    digest: str
    rate_factor: float
    data_start: int
    fingerprint: str | None

    @property
    def name(self) -> str:
        """Such as ``ko/checkpoint-300``."""
        return "/".join(Path(self.checkpoint).parts[-2:])

    def verify(self) -> None:
        """Check that the checkpoint is still there, and the same.

        Raises:
            UserError: it is not.
        """
        place = Path(self.checkpoint)
        if not place.is_dir() or digest_of(place) != self.digest:
            raise UserError(
                "--resume",
                f"{place}, which this branch began from, {'has changed' if place.is_dir() else 'is gone'}",
                "Put it back, or start a new branch.",
            )


def read_branch(checkpoint: str | Path) -> Branch:
    """The branch that begins at `checkpoint`.

    Raises:
        UserError: it is no checkpoint of steep's, is not whole, or its schedule is not one factor for all rates.
    """
    place = Path(checkpoint).expanduser().absolute()
    if not place.is_dir():
        raise UserError("--branch", f"there is no folder {place}", "Give a checkpoint, such as runs/ko/checkpoint-300.")
    missing = [name for name in _NEEDED if not (place / name).is_file()]
    if missing or not re.fullmatch(r"checkpoint-\d+", place.name):
        problem = f"it lacks {missing[0]}" if missing else "it is not called checkpoint-N"
        raise UserError(
            "--branch", f"{place} is no whole checkpoint: {problem}", "Give a checkpoint that `steep train` wrote."
        )
    for name in _TENSORS:  # a file that was cut off is found by its header, before the base is loaded
        try:
            with safe_open(place / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            problem = f"{place} is damaged: {name} cannot be read ({error})"
            raise UserError("--branch", problem, "Give another checkpoint.") from error
    seen = load_state(place, "observations", "--branch")
    factor = seen.get("rate_factor")
    if factor is None:
        raise UserError(
            "--branch",
            f"the learning rate of {place} is not one factor for all groups, so a decay cannot begin at it",
            "Give a checkpoint whose lr_scheduler_type is one of transformers' or of steep's.",
        )
    return Branch(
        checkpoint=str(place),
        step=int(place.name.removeprefix("checkpoint-")),
        digest=digest_of(place),
        rate_factor=factor,
        data_start=seen["data_start"],
        fingerprint=seen["fingerprint"],
    )


def digest_of(folder: Path) -> str:
    """SHA-256 of the lines that ``sha256sum`` prints for the files of `folder`, ordered by the bytes of their names."""
    total = hashlib.sha256()
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix().encode()):
        with path.open("rb") as stream:
            own = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{own}  {path.relative_to(folder).as_posix()}\n".encode())
    return total.hexdigest()
