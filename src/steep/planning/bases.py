"""What a run would need and how long its steps would take over each base, side by side; and which one `auto` is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from steep.amounts import human_bytes
from steep.errors import UserError
from steep.model.load import QUANTISED
from steep.model.machine import Card
from steep.planning.computation import Ground, Sizes
from steep.planning.duration import Pace
from steep.planning.fitting import changed, one_that_fits
from steep.planning.fp8_choice import FIELD, dequantised, why_none
from steep.planning.micro_batch import with_micro_batch
from steep.schema import RunConfig

SHOWN = (*QUANTISED, "bf16")
AUTO, FASTER, ELSE = "auto", "fp8", "nf4"


@dataclass(frozen=True)
class Base:
    """A run over a base.

    Attributes:
        bytes: of the frozen linear weights.
        peak_bytes: of a step, its layers keeping what fits; None: this run cannot be over it, or has no step to come.
        fits: whether that is within what it may fill; None: there is no limit, or no peak.
        rows: of a forward, which the plan may cut otherwise over another base; None as with `peak_bytes`.
        seconds_per_step: None: not known, or it does not fit.
        weight_error: of the frozen linear weights (`steep.model.weight_error`); None: not known, or none.
    """

    bytes: int
    peak_bytes: int | None
    fits: bool | None
    rows: int | None
    seconds_per_step: float | None
    weight_error: float | None

    def as_dict(self) -> dict[str, Any]:
        """In `plan.json`."""
        return asdict(self)


def bases_of(
    config: RunConfig,
    ground: Ground,
    sizes: Sizes,
    pace: Pace | None,
    errors: Mapping[str, float],
    *,
    base: str,
    compute: str,
) -> dict[str, Base]:
    """By name: the run's own base as it is planned, others as a new run over them would be.

    Args:
        config: as it is asked for, where the plan is to cut a step into forwards.
        sizes: of the run's own step.
        errors: of the weights, by base.
        base, compute: the run's own.
    """
    found = {}
    for name in SHOWN:
        there = sizes if name == base else _sizes(config, ground, name)
        fits = None if there is None or ground.budget is None else there.peak <= ground.budget
        found[name] = Base(
            bytes=sizes.shape.linear_bytes(name, compute),
            peak_bytes=None if there is None else there.peak,
            fits=fits,
            rows=None if there is None or there.step is None else there.step.tokens // config.data.max_length,
            seconds_per_step=None if pace is None or there is None or not fits else pace.seconds(there),
            weight_error=errors.get(name),
        )
    return found


def _sizes(config: RunConfig, ground: Ground, base: str) -> Sizes | None:
    """Of a new run; None: it cannot be over that base, or there is nothing more to train."""
    if not ground.to_train:
        return None
    new = replace(ground, before=None)
    try:
        other, _ = with_micro_batch(changed(config, {"model.base": base, "model.fp8_products": "auto"}), new)
        computation = new.computation(other)
    except UserError:
        return None
    return new.sized(other, computation)


def with_base(config: RunConfig, ground: Ground) -> tuple[RunConfig, str | None]:
    """`config` with what `model.base: auto` is for a new run from a 16-bit checkpoint, and why: fp8 where the card
    multiplies in it and a step fits, which is faster than NF4 and closer to the checkpoint (docs/recipe.md), else nf4.
    No timer has a part in it. As it is where there is no card, and without a reason where there is no choice: a base is
    named, a checkpoint is stored in one, or steps were made over one.
    """
    if config.model.base != AUTO or ground.resolved.quantization is not None:
        return config, None
    if ground.before is not None or not ground.to_train:
        return config, None
    if ground.card is None or ground.budget is None:
        return config, "fp8 is chosen for a card that is here or named"
    base, reason = _chosen(config, ground, ground.card, ground.budget)
    return changed(config, {"model.base": base}), reason


def _chosen(config: RunConfig, ground: Ground, card: Card, budget: int) -> tuple[str, str | None]:
    """FASTER or ELSE, and why."""
    if not card.has_fp8_units:
        return ELSE, "the card has no fp8 units"
    if ground.layer is None:
        return ELSE, "products in fp8 are of fused steps"
    faster = changed(config, {"model.base": FASTER})
    try:
        faster, _ = with_micro_batch(faster, ground)
        computation = ground.computation(faster)
    except UserError as error:
        return ELSE, f"over fp8 it cannot be: {error.field}"
    asked, compute, layers = config.model.fp8_products, computation.compute, computation.layers
    if computation.products == "none":  # asked for in one direction, they could not be over another base at all
        return ELSE, f"{FIELD} is {asked}" if asked != "auto" else why_none(FASTER, compute, layers)
    sizes = ground.sized(faster, computation)
    if sizes.peak > budget:
        missing = f"{human_bytes(sizes.peak - budget)} more than it may fill"
        keeps = one_that_fits(faster, ground, sizes, budget)
        would = f"; with {keeps} it would be over fp8" if keeps else ""
        return ELSE, f"over fp8 a step needs {human_bytes(sizes.peak)}, {missing}{would}"
    assert layers is not None  # they are fused
    return FASTER, "; ".join(["the card multiplies in fp8, and a step fits", *dequantised(layers, compute)])
