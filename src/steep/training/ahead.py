"""What the host would else do between two steps, while the GPU has nothing to do."""

from __future__ import annotations

from typing import Any

from steep.model.walked import Walked
from steep.training.adamw8bit import AdamW8bit


def work_ahead(optimizer: Any, model: Any) -> None:
    """Do it now, while the GPU still works on a step's gradients."""
    if isinstance(optimizer, AdamW8bit):
        optimizer.prepare()
    if isinstance(model, Walked):
        model.look_ahead()


def forget_ahead(optimizer: Any, model: Any) -> None:
    """Let go of what `work_ahead` made, where no step follows: it holds the step's gradients."""
    if isinstance(optimizer, AdamW8bit):
        optimizer.forget_prepared()
    if isinstance(model, Walked):
        model.forget_ahead()
