"""Whether a run's steps are fused, and what follows from it: decided once, before any weight is loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from steep import ranks
from steep.errors import UserError
from steep.model.adapters import add_adapters
from steep.model.attention_bytes import BY_KERNEL, AttentionForm
from steep.model.block import LEVELS
from steep.model.choices import Choices
from steep.model.families import fused_class
from steep.model.install import why_not_this_model
from steep.model.layer import Layer
from steep.model.load import DTYPES
from steep.model.machine import Card, why_not_on
from steep.model.placement import HIDDEN
from steep.model.read_layer import read_layer
from steep.model.tiling import tile_sizes
from steep.model.unwrap import unwrap
from steep.ops.fp8_groups import Fp8Products
from steep.planning.cards import MOST_PROCESSORS
from steep.planning.fused_memory import FusedStep
from steep.planning.memory import WORKSPACES, Shape, masters_kept
from steep.schema import RunConfig
from steep.training.adamw8bit import ADAMW_8BIT


def decide(config: RunConfig, empty: Any, before: Choices | None, card: Card | None) -> tuple[Layer | None, str | None]:
    """A layer of the fused run, on the meta device with its adapters; or None, and why the run is not fused.

    Args:
        empty: the model on the meta device.
        before: what the run that goes on was begun with.
        card: that it is planned for, if any.

    Raises:
        UserError: `model.fused: on`, or the steps so far, are fused, and cannot be here.
    """
    asked, was_fused = config.model.fused, before is not None and before.fused
    if asked == "off":
        return None, "model.fused is off"
    if asked == "auto" and not was_fused and (reason := _why_not_by_itself(config, card)):
        return None, reason
    model = empty if fused_class(type(empty)) is None else adapted(config, empty)
    reason = _why_not_with_options(config) or why_not_this_model(model) or why_not_on(card)
    if asked == "auto" and before is not None and not was_fused:
        return None, reason or "the run began so"
    if asked == "on" and reason is not None:
        raise UserError("model.fused", f"the run cannot be fused: {reason}", "Leave it at auto, or change that.")
    if was_fused and reason is not None:
        raise UserError(
            "--resume",
            f"the run is fused so far, and cannot be here: {reason}",
            "Go on where it can be, or set model.fused: off, with --allow model.fused.",
        )
    if reason is not None:
        return None, reason
    layer = unwrap(model).model.layers[0]
    family: Any = fused_class(type(layer))
    return read_layer(layer, family.traits), None


def adapted(config: RunConfig, empty: Any) -> Any:
    """A copy of `empty` with the adapters that the run would train."""
    base = copy.deepcopy(empty).requires_grad_(False)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # PEFT says them once more of the real model
        return add_adapters(base, **config.adapter.model_dump(), resumed=True).train()


def check_adapters(config: RunConfig, empty: Any) -> None:
    """Let PEFT see a model of a family that is not known here: it has layers that it refuses (Mamba's), and would say
    so only when the weights are loaded.

    Raises:
        UserError: it refuses.
    """
    if fused_class(type(empty)) is None:
        adapted(config, empty)


def resolve_trained_dtype(config: RunConfig, fused: bool, compute: str, before: Choices | None) -> str:
    """`auto` in terms of the run: bf16 where that loses nothing, which is in fused steps whose update rounds
    stochastically.

    Raises:
        UserError: bf16 over products in another dtype.
    """
    asked = config.model.trained_dtype
    if asked == "bf16" and compute != "bf16":
        raise UserError(
            "model.trained_dtype",
            f"bf16 cannot be trained where products run in {compute}",
            "Set model.trained_dtype: fp32, or model.compute_dtype: bf16.",
        )
    if asked != "auto":
        return asked
    if before is not None:
        return before.trained_dtype
    return "bf16" if fused and compute == "bf16" and config.training.optim in ADAMW_8BIT else "fp32"


def fused_step(
    config: RunConfig,
    layers: Sequence[Layer],
    shape: Shape,
    *,
    base: str,
    compute: str,
    trained: str,
    on_card: bool,
    card: Card | None = None,
    fp8: Fp8Products = "none",
    hidden: float = HIDDEN,
) -> FusedStep:
    """The step of a run that is fused, as far as memory follows from it.

    Args:
        layers: of `decide`, their weights as they are kept.
        on_card: it is planned for a card.
        card: that card, if more than its memory is known.
        fp8: which products are in fp8.
        hidden: see `FusedStep`.
    """
    saved, training = set(config.adapter.modules_to_save), config.training
    tied = shape.tied
    stored = base if base in ("bf16", "fp16", "fp32") else compute
    return FusedStep(
        shape=shape,
        layers=layers,
        base=base,
        compute=compute,
        trained=trained,
        stream=trained if "embed_tokens" in saved or (tied and saved) else stored,
        optim=training.optim,
        tokens=training.per_device_train_batch_size * config.data.max_length,
        accumulates=training.gradient_accumulation_steps > 1,
        in_backward=training.optimizer_in_backward,
        processes=ranks.world_size(),
        trains_head="lm_head" in saved or (tied and bool(saved)),
        on_card=on_card,
        fp8=fp8,
        offload=training.offload_optimizer if on_card else "none",
        states=training.optimizer_states,
        masters=masters_kept(training, trained),
        micro_batches=training.gradient_accumulation_steps,
        accumulates_in_fp32=training.grad_accum_dtype == "fp32",
        trains_table="embed_tokens" in saved or (tied and bool(saved)),
        hidden=hidden,
        form=_form(config, layers[0], compute, card) if on_card else BY_KERNEL,
    )


def _form(config: RunConfig, layer: Layer, compute: str, card: Card | None) -> AttentionForm:
    processors = (card and card.processors) or MOST_PROCESSORS
    capability, shared = card and card.capability, processors if config.training.deterministic else None
    return AttentionForm.of(layer, DTYPES[compute], config.data.max_length, capability, shared)


def settle(
    config: RunConfig, step: FusedStep, budget: int | None, before: Choices | None, host_room: int = 0
) -> Choices:
    """What the layers of a fused run keep for the backward pass and where, and how its loss is cut: as before (it was
    asked for then, unless memory has run out since), as asked, or as `budget` bytes of the card and `host_room` bytes
    of the host allow. Without a card everything is kept."""
    layers, asked = step.shape.layers, config.training.gradient_checkpointing
    before = before or Choices(True, step.trained)
    levels, places, way, tile = before.levels, before.places, before.loss_way, before.tile
    if levels is None and asked is not None:
        levels = [LEVELS[-1] if asked else LEVELS[0]] * layers
    if before.levels is None or way is None:  # the rest was chosen for its levels
        if budget is None:
            levels, places, way, tile = levels or [LEVELS[0]] * layers, None, step.faster_way, None
        else:
            levels, places, way, tile = step.choose(budget - WORKSPACES, host_room, levels)
    tile = tile or tile_sizes(step.tokens)[0]
    settled = replace(before, fused=True, trained_dtype=step.trained, fp8_products=step.fp8)
    return replace(settled, levels=levels, places=places, chosen_for=0, loss_way=way, tile=tile)


def _why_not_with_options(config: RunConfig) -> str | None:
    adapter = config.adapter
    if adapter.lora_dropout > 0:
        return f"adapter.lora_dropout is {adapter.lora_dropout:g}"
    return "adapter.use_dora is true" if adapter.use_dora else None


def _why_not_by_itself(config: RunConfig, card: Card | None) -> str | None:
    """What `auto` heeds: it can be fused, but need not be better."""
    if card is None:
        return "there is no GPU, and on a CPU the library's forward is faster"
    if config.model.attn_implementation != "auto":
        return f"model.attn_implementation asks for transformers' {config.model.attn_implementation}"
    return None
