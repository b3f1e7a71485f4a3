"""Which linear layers a base keeps quantised, and the config of the model without a word on it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from steep.errors import UserError


def quantisable(model: Any) -> list[str]:
    """The names of the linear layers that an fp8 base keeps in e4m3: all but the head, as with 4 bits."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]


def check_quantisable(model: Any, base: str) -> None:
    """
    Raises:
        UserError: `base` is fp8, and `model` has no layer that it would keep in e4m3: its weights would stay whole.
    """
    if base == "fp8" and not quantisable(model):
        raise UserError(
            "model.base",
            f"{type(model).__name__} has no nn.Linear before its head, and only such layers are kept in e4m3",
            "Set model.base: bf16, over a checkpoint in 16 bits.",
        )


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of `config` that says nothing of how a checkpoint is quantised."""
    config = copy.deepcopy(config)
    for each in (config, config.get_text_config()):
        if getattr(each, "quantization_config", None) is not None:
            del each.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    return config
