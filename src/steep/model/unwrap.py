"""The model inside PEFT's wrapper."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself. Its linear layers still carry the adapters, so what it computes is unchanged."""
    if not isinstance(model, PeftModel):
        return cast(PreTrainedModel, model)
    # PEFT's own get_base_model() asks the active adapter, and there is none when the last one was deleted.
    inside: Any = model.base_model
    return inside if isinstance(inside, PreTrainedModel) else inside.model  # itself, around prompt learning
