"""A model that knows its modules: transformers' Trainer sets the mode and the gradients of all of them at each step,
and nn.Module walks through thousands for either, while the GPU may have nothing to do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, Self

import torch
from torch import nn

from steep.model.unwrap import unwrap


class Walk:
    """The modules of a model, itself included, and the parameters that may have gradients.

    Args:
        let_go: called when one of the modules is no more, so that no other is taken for it.

    Attributes:
        names: the attributes of each module.
        parameters: those of a floating-point dtype.
    """

    def __init__(self, model: nn.Module, let_go: Callable[[Any], object]) -> None:
        modules = list(model.modules())
        self._modules = [weakref.ref(module, let_go) for module in modules]  # attributes are held, and no module
        self.names = [module.__dict__ for module in modules]
        self.parameters: list[torch.Tensor] = [each for each in model.parameters() if each.is_floating_point()]
        self._members = [members for names in self.names for members in (names["_modules"], names["_parameters"])]
        self._found = self._now()

    def holds(self) -> bool:
        """Whether another walk would find the same modules and parameters."""
        return self._now() == self._found

    def _now(self) -> list[int]:
        return [*map(id, chain.from_iterable(map(dict[str, Any].values, self._members)))]


class Walked(nn.Module):
    """An installed model, or PEFT's wrapper around one: walks through its modules where one came or went since."""

    def _walk(self) -> Walk | None:
        """None: the model inside is not installed (any more)."""
        fused: Any = getattr(unwrap(self), "fused", None)
        return None if fused is None else fused.walk(self)

    def train(self, mode: bool = True) -> Self:
        walk = self._walk()
        if walk is None or {names.get("training") for names in walk.names} != {mode}:
            super().train(mode)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        walk = self._walk() if set_to_none else None
        if walk is None:
            return super().zero_grad(set_to_none)
        for parameter in walk.parameters:
            parameter.grad = None
