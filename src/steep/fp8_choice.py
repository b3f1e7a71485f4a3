"""Which products of a run over an fp8 base are in fp8, decided before any weight is loaded; and its layers on paper."""

from __future__ import annotations

from dataclasses import replace

import torch

from steep.errors import UserError
from steep.model.choices import Choices
from steep.model.layer import Layer
from steep.model.load import DTYPES
from steep.model.machine import LACKS_FP8_UNITS, lacks_fp8_units
from steep.ops.fp8 import BLOCK, E4M3, Fp8Weight
from steep.ops.fp8_groups import Fp8Products
from steep.ops.lora import Projection
from steep.schema import RunConfig

FIELD = "model.fp8_products"


def resolve_fp8_products(
    config: RunConfig,
    base: str,
    compute: str,
    before: Choices | None,
    *,
    layer: Layer | None,
    on_card: bool,
    to_train: bool = True,
) -> Fp8Products:
    """`auto` in terms of the run: those of the steps before, else both where the card has fp8 units.

    Args:
        before: what the run that goes on was begun with.
        layer: of a fused run, with its weights as they are kept; None: it is not fused.
        on_card: steps are computed on the card that is here. Without one `auto` is none, also where a card's memory is
            planned for: a plan is that of the run on the same machine.
        to_train: whether steps are still to come. What those of a finished run had is known, and any card opens it.

    Raises:
        UserError: some are asked for that cannot be, or the steps so far had some and this card cannot.
    """
    asked, kept = config.model.fp8_products, before.fp8_products if before is not None else None
    wanted = kept if asked == "auto" and kept is not None else asked
    if wanted == "none":
        return "none"
    reason = _why_not(base, compute, layer)
    if reason is None and to_train and lacks_fp8_units():
        reason = LACKS_FP8_UNITS
    if wanted == "auto":
        return "both" if reason is None and on_card else "none"
    if reason is not None:
        if asked == "auto":
            remedy = "Go on where it can be, or set model.fp8_products: none, with --allow model.fp8_products."
            raise UserError("--resume", f"products are in fp8 so far, and cannot be here: {reason}", remedy)
        raise UserError(FIELD, f"no product can be in fp8: {reason}", "Leave it at auto, or change that.")
    return wanted


def _why_not(base: str, compute: str, layer: Layer | None) -> str | None:
    if base != "fp8":
        return f"model.base is {base}"
    if layer is None:
        return "the steps are not fused"
    if compute == "fp32":
        return "model.compute_dtype is fp32"
    return layer.why_no_fp8(DTYPES[compute])


def dequantised(layer: Layer, compute: str) -> list[str]:
    """What the user of a run with products in fp8 should know, in plain words: of which groups they are not."""
    reasons = layer.why_dequantised(DTYPES[compute])
    if not reasons:
        return []
    return [f"{len(reasons)} of the 4 groups of products in each layer are not in fp8: {reasons[0]}"]


def in_fp8(layer: Layer, *, blocks: bool) -> Layer:
    """A layer on the meta device with all its weights in e4m3.

    Those that a published checkpoint has in 16 bits may be other ones in each layer, and one layer stands for all here:
    the bytes and buffers of such weights are not counted.

    Args:
        blocks: a scale is that of a block of 128 x 128, else of a row.
    """

    def stored(projection: Projection) -> Projection:
        rows, columns = projection.weight.shape
        scale = (-(-rows // BLOCK), -(-columns // BLOCK)) if blocks else (rows,)
        codes = torch.empty(rows, columns, dtype=E4M3, device="meta")
        return replace(projection, weight=Fp8Weight(codes, torch.empty(scale, device="meta")))

    q, k, v = map(stored, layer.qkv)
    gate, up = map(stored, layer.gate_up)
    return replace(layer, qkv=(q, k, v), o=stored(layer.o), gate_up=(gate, up), down=stored(layer.down))
