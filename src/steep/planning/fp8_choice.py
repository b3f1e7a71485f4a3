"""Which products of a run over an fp8 base are in fp8, decided before any weight is loaded; and its layers on paper."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from steep.errors import UserError
from steep.model.base_tensors import BaseTensors
from steep.model.choices import Choices
from steep.model.fp8_published import STORED_E4M3, is_published_fp8
from steep.model.layer import Layer
from steep.model.load import DTYPES
from steep.model.machine import LACKS_FP8_UNITS, Card
from steep.model.resolve import ResolvedModel
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
    layers: Sequence[Layer] | None,
    card: Card | None,
    to_train: bool = True,
) -> Fp8Products:
    """`auto` in terms of the run: those of the steps before, else both where the card has fp8 units.

    Args:
        before: what the run that goes on was begun with.
        layers: those that there are of a fused run, with their weights as they are kept; None: it is not fused.
        card: that the steps are planned for. Without one `auto` is none, also where an amount of memory is planned for:
            a plan is that of the run on the same machine.
        to_train: whether steps are still to come. What those of a finished run had is known, and any card opens it.

    Raises:
        UserError: some are asked for that cannot be, or the steps so far had some and this card cannot.
    """
    asked, kept = config.model.fp8_products, before.fp8_products if before is not None else None
    wanted = kept if asked == "auto" and kept is not None else asked
    if wanted == "none":
        return "none"
    reason = why_none(base, compute, layers)
    if reason is None and to_train and card is not None and not card.has_fp8_units:
        reason = LACKS_FP8_UNITS
    if wanted == "auto":
        return "both" if reason is None and to_train and card is not None else "none"
    if reason is not None:
        if asked == "auto":
            remedy = "Go on where it can be, or set model.fp8_products: none, with --allow model.fp8_products."
            raise UserError("--resume", f"products are in fp8 so far, and cannot be here: {reason}", remedy)
        raise UserError(FIELD, f"no product can be in fp8: {reason}", "Leave it at auto, or change that.")
    return wanted


def why_none(base: str, compute: str, layers: Sequence[Layer] | None) -> str | None:
    """Why no product of a run can be in fp8, on whatever card; None: some can."""
    if base != "fp8":
        return f"model.base is {base}"
    if layers is None:
        return "the steps are not fused"
    if compute == "fp32":
        return "model.compute_dtype is fp32"
    reasons = [layer.why_no_fp8(DTYPES[compute]) for layer in layers]
    return None if None in reasons else reasons[0]


def dequantised(layers: Sequence[Layer], compute: str) -> list[str]:
    """What the user of a run with products in fp8 should know, in plain words: of which groups they are not."""
    reasons = max((layer.why_dequantised(DTYPES[compute]) for layer in layers), key=len)
    if not reasons:
        return []
    where = "each layer" if len(layers) == 1 else "some layers"
    return [f"{len(reasons)} of the 4 groups of products in {where} are not in fp8: {reasons[0]}"]


def kept_in_16_bits(resolved: ResolvedModel, linear: Sequence[str]) -> set[str]:
    """Which of the layers called `linear` a checkpoint that is published in e4m3 has in 16 bits, by its tensors; none
    where its files are still in the hub."""
    if not is_published_fp8(resolved.quantization):
        return set()
    tensors = BaseTensors(resolved.name, revision=resolved.arguments.get("revision"), download=False)
    weights = {name: f"{name}.weight" for name in linear}
    return {name for name, weight in weights.items() if weight in tensors and tensors.kind(weight) != STORED_E4M3}


def in_fp8(layer: Layer, linear: Sequence[str], kept: Collection[str], *, blocks: bool) -> list[Layer]:
    """What layers of a model over an fp8 base there are on the meta device: one for each choice of weights that a
    published checkpoint has in 16 bits.

    Args:
        layer: one with all weights in 16 bits.
        linear: names of the model's linear layers.
        kept: those of them that are in 16 bits.
        blocks: a scale is that of a block of 128 x 128, else of a row.
    """
    of_layers: dict[str, set[str]] = {}
    for name in linear:
        place, _, last = name.rsplit(".", 2)
        of_layers.setdefault(place, set()).update([last] if name in kept else [])
    return [_stored(layer, whole, blocks) for whole in dict.fromkeys(map(frozenset, of_layers.values()))]


def _stored(layer: Layer, whole: Collection[str], blocks: bool) -> Layer:
    def stored(projection: Projection, name: str) -> Projection:
        if name in whole:
            return projection
        rows, columns = projection.weight.shape
        scale = (-(-rows // BLOCK), -(-columns // BLOCK)) if blocks else (rows,)
        codes = torch.empty(rows, columns, dtype=E4M3, device="meta")
        return replace(projection, weight=Fp8Weight(codes, torch.empty(scale, device="meta")))

    q, k, v = map(stored, layer.qkv, ("q_proj", "k_proj", "v_proj"))
    gate, up = map(stored, layer.gate_up, ("gate_proj", "up_proj"))
    o, down = stored(layer.o, "o_proj"), stored(layer.down, "down_proj")
    return replace(layer, qkv=(q, k, v), o=o, gate_up=(gate, up), down=down)
