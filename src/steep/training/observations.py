"""What a checkpoint's ``observations`` hold: what the trainer saw of the run so far, beside weights and states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import InstanceOf
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from steep.errors import UserError
from steep.recorded import Count, Number, checked
from steep.training.state_files import load_state

Tensor = InstanceOf[torch.Tensor]


class Record(TypedDict):
    group: str
    learning_rate: Number
    updates: Count
    nonzero_gradient: bool
    elements: Count
    elements_checked: Count
    changed_share: Number


class Proof(TypedDict):
    records: dict[str, Record]
    frozen: dict[str, str]
    start: dict[str, Tensor]
    decay_only: dict[str, Number]


class Window(TypedDict):
    tokens: Count
    losses: list[Number]
    sum: Number
    steps: Count


class Observations(TypedDict):
    proof: Proof
    judged: bool
    times_seen: Tensor
    times_trained: Tensor
    times_skipped: Tensor
    times_seen_before: Tensor
    fingerprint: str | None
    data_start: Count
    rate_factor: Number | None
    window: Window
    guard: dict[str, Any]


def load_observations(folder: Path, field: str = "--resume") -> dict[str, Any]:
    """The observations of the checkpoint in `folder`.

    Raises:
        UserError: they are damaged, or of another shape.
    """
    state = load_state(folder, "observations", field)
    try:
        return checked(state, Observations)
    except ValueError as error:
        problem = f"{folder} is damaged: observations.json: {error}"
        raise UserError(field, problem, "Give another checkpoint, or delete that one.") from error


def refuse_other_counts(counts: torch.Tensor, rows: int, field: str) -> None:
    """Check that a checkpoint counts the rows of this run's text.

    Raises:
        UserError: it does not.
    """
    if counts.shape != (rows,) or counts.dtype != torch.int64:
        problem = f"the checkpoint counts rows as {counts.dtype} of shape {list(counts.shape)}, and the text has {rows}"
        raise UserError(field, problem, "Give a checkpoint that this run wrote.")
