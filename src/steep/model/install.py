"""The fused forward put on a model, and taken off: the classes of its own decoder, layers and causal LM, and of
PEFT's wrapper, are set.

Nothing else changes, and no other model: parameters, their names and their adapters stay where they are, so PEFT,
Trainer, saving, merging and generate() find what they know. The fused forward looks at all of it at each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from steep.errors import UserError
from steep.model.block import LEVELS, PLACES, Place
from steep.model.families import FUSED, fused_class, library_class
from steep.model.fused import Fused
from steep.model.loss import FusedCausalLM
from steep.model.machine import LACKS_FP8_UNITS, lacks_fp8_units, why_not_here
from steep.model.projections import Unfused, compute_dtype, refuse_own_forward
from steep.model.read_layer import read_layer
from steep.model.recompute import Updates, bytes_beside_decoder
from steep.model.refusals import refuse_config, refuse_decoder, refuse_hooks_of_layer, refuse_prefixes
from steep.model.unwrap import has_adapters, unwrap
from steep.ops.fp8_groups import FP8_PRODUCTS, Fp8Products


def install(
    model: Any,
    *,
    levels: int | Sequence[int] | None = None,
    places: Place | Sequence[Place] | None = None,
    logits: bool = False,
    fp8_products: Fp8Products | None = None,
    tile: int | None = None,
) -> Any:
    """Let `model`, a causal LM of transformers or PEFT's wrapper around one, compute with steep's fused layers.

    Every call without a key-value cache is then fused, in training and in evaluation. A call that cannot be goes
    through the library's own forward, and a line says why.

    Args:
        levels: what layers keep for the backward pass, from 0 (most memory, fastest) to 3, for all or for each; see
            `steep.model.block`. None: chosen for the free memory at the first call that trains, and again for a
            longer batch.
        places: where layers keep that, for all or for each: ``gpu``, or in host memory ``x`` (a layer's input),
            ``attention`` (all but the MLP's) or ``all``; see `steep.model.block`. With `levels`
            only. None: on the GPU, or chosen with the levels.
        logits: give logits too where there are labels, without a gradient (for `compute_metrics`).
        fp8_products: which products over an fp8 base are in fp8: ``both`` directions, ``backward`` or ``none``. None:
            both on a card with fp8 units, none elsewhere.
        tile: tokens that a layer computes at a time where rows do not depend on each other: the fewer, the less memory
            a long batch takes. With `levels` only. None: chosen with the levels, or all up to 16,384.

    Returns:
        `model` itself.

    Raises:
        UserError: it is of no family that is known, holds what is not computed fused, or can have no product in fp8
            where some are asked for; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            "model", f"it is a {type(model).__name__}", "Give the model itself, a causal LM of transformers."
        )
    reason = why_not_fused(model)
    if reason is not None:
        remedy = "Change that, or train it without steep.install."
        if _trains_without_adapters(model):
            remedy = "Put adapters on it first, with steep.add_adapters or PEFT's get_peft_model: all of it trains now."
        raise UserError("model", f"it cannot be fused: {reason}", remedy)
    base: Any = unwrap(model)
    decoder = base.model
    num_layers = len(decoder.layers)
    levels = _for_each(levels, num_layers, "levels", LEVELS, "from 0 to 3")
    places = _for_each(places, num_layers, "places", PLACES, f"of {', '.join(PLACES)}")
    if tile is not None and (type(tile) is not int or tile < 1):
        raise UserError("tile", f"{tile!r} is no number of tokens", "Give a whole number above 0, such as 4096.")
    for name, value in {"places": places, "tile": tile}.items():
        if value is not None and levels is None:
            raise UserError(
                name, "it is chosen with the levels where those are not given", "Give levels too, or neither."
            )
    if fp8_products not in (None, *FP8_PRODUCTS):
        problem = f"{fp8_products!r} is unknown"
        raise UserError("fp8_products", problem, f"Give one of {', '.join(FP8_PRODUCTS)}, or None.")
    if fp8_products in ("both", "backward") and (reason := _why_no_fp8(decoder)):
        remedy = "Leave it out, or load the base with base='fp8' and compute_dtype='bf16', for a card that has them."
        raise UserError("fp8_products", f"no product can be in fp8: {reason}", remedy)
    replaced = not is_installed(model) and "forward" in vars(base)  # later, it is around the fused one
    base.fused = decoder.fused = Fused(
        levels=levels,
        places=places,
        logits=logits,
        fp8=fp8_products,
        tile=tile,
        beside=bytes_beside_decoder(base, Updates()),
    )
    for module in (*_modules(base), model):
        module.__class__ = fused_class(type(module)) or type(module)
    if replaced:
        base.fused.say_once("the loss is not fused: the forward of the causal LM was replaced", fused=True)
    if any(_drops(module) for module in decoder.layers.modules()):  # not now: in training mode that is refused
        base.fused.say_once("it has dropout: what is evaluated is fused, and training will not be", fused=True)
    return model


def uninstall(model: Any) -> Any:
    """Give `model` the library's own classes back. One that has them is left as it is.

    Raises:
        UserError: a wrapper (FSDP) has put classes of its own over the fused ones.
    """
    base: Any = unwrap(model)
    if is_installed(model):
        for module in _modules(base):
            if type(module) not in FUSED:
                problem = f"the fused forward cannot be taken off a {type(module).__name__}"
                raise UserError("model", problem, "Take it off before the model is wrapped.")
        for module in _modules(base):
            module.__class__ = library_class(type(module))
        del base.fused, base.model.fused
    model.__class__ = library_class(type(model))  # PEFT's wrapper, though the model in it was uninstalled before
    return model


def is_installed(model: Any) -> bool:
    base = unwrap(model)  # one that `type(model)(config)` made has the class and no more
    return isinstance(base, FusedCausalLM) and hasattr(base, "fused")


def fused_of(model: Any) -> Fused:
    """How an installed model computes.

    Raises:
        UserError: it is not installed.
    """
    if not is_installed(model):
        raise UserError("model", "it is not fused", "Call steep.install(model) first.")
    return cast(Fused, unwrap(model).fused)


def why_not_fused(model: Any) -> str | None:
    """Why `install` would refuse; None: it would not."""
    return None if is_installed(model) else why_not_this_model(model) or why_not_here()


def why_not_this_model(model: Any) -> str | None:
    """What of the model itself forbids it, on any card."""
    base: Any = unwrap(model)
    family = fused_class(type(base))
    decoder = getattr(base, "model", None)
    if family is None or decoder is None or fused_class(type(decoder)) is None:
        known = ", ".join(fused.__name__ for fused in FUSED if issubclass(fused, FusedCausalLM))
        return f"{type(base).__name__} is not one of {known}"
    try:
        refuse_prefixes(model)
        refuse_own_forward(decoder, "the decoder")
        refuse_config(decoder.config, decoder.layers)
        for number, layer in enumerate(decoder.layers):
            fused = fused_class(type(layer))
            if fused is None:
                raise Unfused(f"it has a {type(layer).__name__}")
            refuse_hooks_of_layer(layer, f"layer {number}")
            read_layer(layer, fused.traits)
        refuse_decoder(decoder)
    except Unfused as reason:
        return str(reason)
    return None


def _for_each(given: Any, num_layers: int, field: str, known: Sequence[Any], which: str) -> list[Any] | None:
    """One value of `known` for each layer."""
    if given is None:
        return None
    values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * num_layers
    if len(values) != num_layers or any(type(value) is not type(known[0]) or value not in known for value in values):
        raise UserError(field, f"{given} are no {field} of {num_layers} layers", f"Give one {which}, or one for each.")
    return values


def _why_no_fp8(decoder: Any) -> str | None:
    """Why none of its products can be in fp8; None: some can, or it is not known before a call."""
    if lacks_fp8_units():
        return LACKS_FP8_UNITS
    reason = None
    for layer in decoder.layers:
        fused = fused_class(type(layer))
        if fused is None:  # FSDP's wrapper: its tensors are other ones when it is called
            return None
        dtype = compute_dtype(layer.mlp.down_proj, decoder.norm.weight)
        try:
            of_layer = read_layer(layer, fused.traits).why_no_fp8(dtype)
        except Unfused:  # something was changed since the model was installed
            return None
        if of_layer is None:
            return None
        reason = reason or of_layer
    return reason


def _modules(base: Any) -> Iterator[torch.nn.Module]:
    yield base
    yield base.model
    yield from base.model.layers


def _trains_without_adapters(model: Any) -> bool:
    """As every model does before `get_peft_model`."""
    return not has_adapters(model) and all(parameter.requires_grad for parameter in model.parameters())


def _drops(module: torch.nn.Module) -> bool:
    """Whether it drops something in training."""
    dropout = module.p if isinstance(module, torch.nn.Dropout) else getattr(module, "attention_dropout", 0.0)
    return bool(dropout)
