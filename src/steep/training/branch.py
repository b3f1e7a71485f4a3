"""A branch: a new run that goes on from a checkpoint of another one, its parent."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steep.errors import UserError
from steep.manifest import Damaged, read_manifest
from steep.model.resolve import read_tokenizer_folder
from steep.training.checkpoint import Checkpoint, checkpoints, given, inspect, refuse_other_format
from steep.training.observations import load_observations
from steep.training.skip_list import as_json, steps_behind


@dataclass(frozen=True)
class Branch:
    """Where a branch leaves its parent. `parent.json` of its run folder.

    Attributes:
        checkpoint: absolute path of the parent's checkpoint.
        step: the parent's step there; the branch counts on from it.
        digest: SHA-256 of the checkpoint's manifest, and through it of every file of the checkpoint.
        rate_factor: what the parent's schedule multiplied its peak rates by, for the step that came next.
        data_start: the step at which the epochs of the parent's text began: 0, or where it was a branch itself.
        fingerprint: of the parent's rows (`Corpus.fingerprint`); None without a `Corpus`.
        passed_over: the later steps that the parent passed over by then, as in its ``skipped_steps.json``.
    """

    checkpoint: str
    step: int
    digest: str
    rate_factor: float
    data_start: int
    fingerprint: str | None
    passed_over: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Such as ``ko/checkpoint-300``."""
        return "/".join(Path(self.checkpoint).parts[-2:])

    def verify(self, field: str = "--resume") -> Checkpoint:
        """Check that the checkpoint is still there, and the same, and in a format that this version reads.

        Raises:
            UserError: it is not.
        """
        place, remedy = Path(self.checkpoint), "Put it back, or start a new branch."
        try:
            checkpoint = inspect(place)
        except Damaged as damage:
            what = f"has changed: {damage}" if place.is_dir() else "is gone"
            raise UserError(field, f"{place}, which this branch began from, {what}", remedy) from damage
        if checkpoint.digest != self.digest:
            raise UserError(field, f"{place}, which this branch began from, has changed", remedy)
        refuse_other_format(checkpoint, field)
        return checkpoint

    def tokenizer(self) -> Any:
        """The parent's tokenizer, from files that belong to the checkpoint: transformers reads whatever lies there."""
        with tempfile.TemporaryDirectory() as place:
            for name in read_manifest(Path(self.checkpoint)).files:
                if not name.endswith(".safetensors"):
                    (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(Path(self.checkpoint) / name, Path(place) / name)
            return read_tokenizer_folder(Path(place), "--branch")


def read_branch(checkpoint: str | Path) -> Branch:
    """The branch that begins at `checkpoint`.

    Raises:
        UserError: it is no checkpoint of steep's, is not whole, or its schedule is not one factor for all rates.
    """
    place = Path(checkpoint).expanduser().absolute()
    if not place.is_dir():
        there = [path.name for path in checkpoints(place.parent)]
        remedy = f"There are {', '.join(there)}." if there else "Give a checkpoint, such as runs/ko/checkpoint-300."
        raise UserError("--branch", f"there is no folder {place}", remedy)
    if not re.fullmatch(r"checkpoint-\d+", place.name):
        problem = f"{place} is no whole checkpoint: it is not called checkpoint-N"
        raise UserError("--branch", problem, "Give a checkpoint that `steep train` wrote.")
    parent = given(place, "--branch")
    seen = load_observations(place, "--branch")
    factor = seen.get("rate_factor")
    if factor is None:
        raise UserError(
            "--branch",
            f"the learning rate of {place} is not one factor for all groups, so a decay cannot begin at it",
            "Give a checkpoint whose lr_scheduler_type is one of transformers' or of steep's.",
        )
    return Branch(
        checkpoint=str(place),
        step=parent.step,
        digest=parent.digest,
        rate_factor=factor,
        data_start=seen["data_start"],
        fingerprint=seen["fingerprint"],
        passed_over=as_json(steps_behind(place)),
    )
