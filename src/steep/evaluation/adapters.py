"""The base model that a model was before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from steep.errors import UserError
from steep.model.original_module import OriginalModule, lend_copies
from steep.model.unwrap import unwrap


@contextmanager
def base_model(model: nn.Module, vocabulary: int | None = None, *, untrained: bool = False) -> Iterator[None]:
    """Switch adapters and trained copies of modules off: the model then computes what the untouched base computes.

    PEFT's `disable_adapter()` turns `requires_grad` on for every active adapter when it ends, a frozen one included,
    which changes what trains next; here each parameter gets back the flag that it had.

    Args:
        vocabulary: how many ids the untouched base has, where new tokens were added behind them: the others are then
            not predicted, so that the losses are the untouched base's; rows that a base has to spare are not either,
            which it predicts with next to no probability.
        untrained: nothing of the model was trained yet, so that its copies of modules are those of the base.

    Raises:
        UserError: the model has no adapters, so there is no second model to compare with.
    """
    if not isinstance(model, PeftModel):
        raise UserError(
            "model",
            f"{type(model).__name__} has no adapters, so its base model is gone",
            "Pass a PeftModel, or evaluate the two models one by one",
        )
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter(), _only_the_first(model, vocabulary):
            if untrained:
                lend_copies(model)
            yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _only_the_first(model: nn.Module, vocabulary: int | None) -> Iterator[None]:
    """Let the frozen head end after `vocabulary` rows; a table that is tied to it ends there too."""
    if vocabulary is None:
        yield
        return
    head: Any = unwrap(model).get_output_embeddings()
    original: Any = getattr(head, "original_module", head)
    if isinstance(original, OriginalModule):
        with original.only_the_first(vocabulary):
            yield
        return
    weight = original.weight
    whole = weight.data
    weight.data = whole[:vocabulary]
    try:
        yield
    finally:
        weight.data = whole
