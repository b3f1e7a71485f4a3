"""Learning-rate schedules that end above zero; every other schedule is transformers' own.

Each parameter group keeps its own peak rate: a schedule is one factor that multiplies them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from steep.errors import UserError


def linear_to(progress: float, min_lr_rate: float) -> float:
    """Factor at `progress` in [0, 1] after the warm-up: from 1 straight down to `min_lr_rate`."""
    return 1 - (1 - min_lr_rate) * progress


def cosine_to(progress: float, min_lr_rate: float) -> float:
    """Factor at `progress` in [0, 1] after the warm-up: half a cosine to `min_lr_rate` (Loshchilov & Hutter 2016)."""
    return min_lr_rate + (1 - min_lr_rate) * 0.5 * (1 + math.cos(math.pi * progress))


SHAPES: dict[str, Callable[[float, float], float]] = {"linear": linear_to, "cosine": cosine_to}


def warmed_up(step: int, *, shape: str, num_warmup_steps: int, num_training_steps: int, min_lr_rate: float) -> float:
    """Factor at `step`: linear warm-up from zero, then `shape` down to `min_lr_rate`, reached at the last step."""
    if step < num_warmup_steps:
        return step / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
    return SHAPES[shape](min(1.0, progress), min_lr_rate)


def schedule_with_min_rate(
    optimizer: torch.optim.Optimizer,
    *,
    scheduler_type: str,
    num_warmup_steps: int,
    num_training_steps: int,
    min_lr_rate: float,
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler for every group of `optimizer`.

    Raises:
        UserError: a schedule that has no end to raise (constant and the like).
    """
    if scheduler_type not in SHAPES:
        raise UserError(
            "min_lr_rate",
            f"{min_lr_rate} has no meaning for the schedule {scheduler_type!r}",
            f"Use it with {' or '.join(SHAPES)}, or set it to 0.",
        )
    factor = partial(
        warmed_up,
        shape=scheduler_type,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        min_lr_rate=min_lr_rate,
    )
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
