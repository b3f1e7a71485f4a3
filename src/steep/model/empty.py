"""A model without its weights, on torch's meta device: its modules and shapes, from its config alone."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from steep.foreign import told_as_input
from steep.model.attention import attention, attention_refused
from steep.model.resolve import ODD_CONFIG, ResolvedModel


def empty_model(resolved: ResolvedModel, attn_implementation: str = "auto", field: str = "model.name") -> Any:
    """The model that the config of `resolved` describes; its own copy of the config may be changed.

    Raises:
        UserError: the config describes none, or the attention backend cannot be used.
    """
    choice = attention(attn_implementation, resolved.config)
    with told_as_input(field, f"the config.json of {resolved.name} makes no model", ODD_CONFIG):
        layers = getattr(resolved.config.get_text_config(), "num_hidden_layers", 1)
        if layers < 1:
            raise ValueError(f"num_hidden_layers is {layers}")
        with torch.device("meta"), attention_refused(attn_implementation):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(resolved.config),
                trust_remote_code=resolved.arguments.get("trust_remote_code", False),
                **choice,
            )


def check_computes(empty: Any, field: str = "model.name") -> None:
    """Let two tokens go through what `empty_model` gave: some values of a config are looked at only then.

    Raises:
        UserError: one is not of the type that the code expects.
    """
    if empty.config._attn_implementation not in ("eager", "sdpa"):  # kernels that know no meta device
        return
    with (
        told_as_input(field, f"the config.json of {empty.config.name_or_path} makes no model", ODD_CONFIG),
        torch.no_grad(),
        # What says nothing of types is let pass: some families look at values, which the meta device has none of.
        suppress(RuntimeError, LookupError, ValueError),
    ):
        # With a cache, as for samples, which reads more of the config; BLT's has no place for one.
        use_cache = hasattr(empty.config.get_text_config(), "num_hidden_layers")
        empty(input_ids=torch.zeros(1, 2, dtype=torch.int64, device="meta"), use_cache=use_cache)
