"""Inference on a model that is being trained: afterwards every module is in the mode that it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from steep.model.unwrap import unwrap


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the input embeddings, which is not the head's if the model is spread out."""
    embeddings: Any = unwrap(model).get_input_embeddings()
    return next(embeddings.parameters()).device


@contextmanager
def inference_mode(model: nn.Module, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Evaluate in eval mode without gradients, under autocast if `autocast_dtype` is given; then undo all of it.

    `torch.no_grad` rather than `torch.inference_mode`: a tensor that a layer makes in there and keeps (a rotary
    table, a dequantised weight) can never be saved for a later backward.
    Every module gets back its own `training`; a frozen part may have been in eval mode while the rest trained.
    """
    modes = [(module, module.training) for module in model.modules()]
    autocast = nullcontext()
    if autocast_dtype is not None:
        autocast = torch.autocast(input_device(model).type, dtype=autocast_dtype)
    try:
        model.eval()
        with torch.no_grad(), autocast:
            yield
    finally:
        for module, training in modes:
            module.training = training
