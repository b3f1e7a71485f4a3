"""A model without its weights, on torch's meta device: its modules and shapes, from its config alone."""

from __future__ import annotations

import copy
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
