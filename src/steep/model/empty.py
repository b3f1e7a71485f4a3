"""A model without its weights, on torch's meta device: its modules and shapes, from its config alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from steep.errors import UserError
from steep.model.attention import attention, attention_refused
from steep.model.resolve import ResolvedModel

# What the code of a family raises at values that it did not expect.
ODD_CONFIG = (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def empty_model(resolved: ResolvedModel, attn_implementation: str = "auto", field: str = "model.name") -> Any:
    """The model that the config of `resolved` describes; its own copy of the config may be changed.

    Raises:
        UserError: the config describes none, or the attention backend cannot be used.
    """
    choice = attention(attn_implementation, resolved.config)
    try:
        with torch.device("meta"), attention_refused(attn_implementation):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(resolved.config),
                trust_remote_code=resolved.arguments.get("trust_remote_code", False),
                **choice,
            )
    except ODD_CONFIG as error:
        problem = f"the config.json of {resolved.name} makes no model: {type(error).__name__}: {error}"
        raise UserError(field, problem, "Put its values back as they were, or download it again.") from error
