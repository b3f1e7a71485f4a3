"""What was chosen for a model and not asked for: a checkpoint keeps it, and whoever goes on from it does the same."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from steep.errors import UserError
from steep.model.block import Place
from steep.model.install import fused_of, is_installed
from steep.model.load import DTYPES
from steep.model.machine import LACKS_FP8_UNITS, lacks_fp8_units
from steep.model.unwrap import unwrap
from steep.ops.fp8_groups import Fp8Products
from steep.ops.linear_cross_entropy import Way

logger = logging.getLogger("steep")


@dataclass(frozen=True)
class Choices:
    """`choices.json` of a checkpoint.

    Attributes:
        fused: whether the model computes with steep's fused layers.
        trained_dtype: of what trains: fp32, bf16, or torch's name of another.
        levels: what each fused layer keeps for its backward pass; None: not known yet.
        chosen_for: tokens of the batch that the levels were chosen for: a longer one chooses again. 0: they were given,
            or memory has run out since.
        tile: tokens that a fused layer computes at a time; None: not known.
        loss_way: how the loss is cut, see `steep.ops.linear_cross_entropy`; None: not known.
        backends: of attention, by kind of layer and batch.
        fp8_products: which products over an fp8 base are in fp8; None: not known, or not fused.
        places: where each fused layer keeps it (`steep.model.block`); None: on the GPU, or not known yet.
    """

    fused: bool
    trained_dtype: str
    levels: list[int] | None = None
    chosen_for: int = 0
    loss_way: Way | None = None
    backends: dict[str, str] = field(default_factory=dict)
    fp8_products: Fp8Products | None = None
    tile: int | None = None
    places: list[Place] | None = None


def choices_of(model: Any) -> Choices:
    """What `model` computes with now."""
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    trained = next((p.dtype for p in model.parameters() if p.requires_grad), torch.float32)
    trained_dtype = dtypes.get(trained, str(trained))
    if not is_installed(model):
        return Choices(False, trained_dtype)
    fused = fused_of(model)
    backends = dict(fused.backends.chosen)
    return Choices(
        True,
        trained_dtype,
        fused.levels,
        fused.chosen_for,
        fused.loss_way,
        backends,
        fused.fp8,
        fused.tile,
        fused.places,
    )


def take_over(model: Any, choices: Choices) -> None:
    """Let `model` go on with `choices`, where it was not told otherwise; a difference that it cannot mend is said.

    Raises:
        UserError: products are in fp8 so far, and this card has no units for them.
    """
    if is_installed(model) != choices.fused:
        now, before = ("fused", "not") if is_installed(model) else ("not fused", "fused")
        logger.warning("the steps from here on are %s, and those before were %s: sums round otherwise", now, before)
    if not (is_installed(model) and choices.fused):
        return
    fused = fused_of(model)
    if fused.fp8 is None and choices.fp8_products in ("both", "backward") and lacks_fp8_units():
        remedy = "Go on where it has, or give steep.install(model, fp8_products='none')."
        raise UserError("fp8_products", f"products are in fp8 so far, and cannot be here: {LACKS_FP8_UNITS}", remedy)
    if fused.levels is None and choices.levels is not None:
        fused.levels, fused.chosen_for, fused.tile = choices.levels, choices.chosen_for, choices.tile
        fused.places = choices.places
        fused.measure(unwrap(model).model)  # there are no states of the optimizer yet
    fused.loss_way = fused.loss_way or choices.loss_way
    fused.fp8 = fused.fp8 or choices.fp8_products
    fused.backends.chosen = {**choices.backends, **fused.backends.chosen}
