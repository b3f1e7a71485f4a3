"""The model inside PEFT's wrapper."""

from __future__ import annotations

from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself. Its linear layers still carry the adapters, so what it computes is unchanged."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
