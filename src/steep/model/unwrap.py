"""PEFT's parts of a model: the wrapper around it, and adapters inside."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself. Its linear layers still carry the adapters, so what it computes is unchanged."""
    if not isinstance(model, PeftModel):
        return cast(PreTrainedModel, model)
    # PEFT's own get_base_model() asks the active adapter, and there is none when the last one was deleted.
    inside: Any = model.base_model
    return inside if isinstance(inside, PreTrainedModel) else inside.model  # itself, around prompt learning


def has_adapters(model: nn.Module) -> bool:
    """Whether a layer of it carries any, also where PEFT's wrapper was taken off."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())
