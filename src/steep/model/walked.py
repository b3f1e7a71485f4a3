"""A model that walks fast through its modules: transformers' Trainer sets the mode and the gradients of all of them at
each step, and nn.Module's own way takes milliseconds for thousands, while the GPU may have nothing to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel


class Walked(nn.Module):
    """An installed model, or PEFT's wrapper around one."""

    _with_gradient: list[nn.Parameter] | None = None  # what `look_ahead` found, until it is used
    _with_mode: list[nn.Module] | None = None

    def look_ahead(self) -> None:
        """Walk now, while the GPU has work, for the `zero_grad` and the `train()` that come next: after a step's
        backward pass. They then look no further than at the parameters that have a gradient now or may get one, and at
        the modules that compute by their mode."""
        self.train()
        with torch._C.DisableTorchFunctionSubclass():
            self._with_gradient = [each for each in _parameters(self) if each.requires_grad or each.grad is not None]
        self._with_mode = _with_mode(self)

    def forget_ahead(self) -> None:
        """Let go of what `look_ahead` found."""
        self.__dict__.pop("_with_gradient", None)
        self.__dict__.pop("_with_mode", None)

    def train(self, mode: bool = True) -> Self:
        known = self.__dict__.pop("_with_mode", None)
        if known is not None and mode and _is_set(known, mode):
            return self
        if not all(_is_set(level, mode) for level in _levels(self)):
            super().train(mode)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            return super().zero_grad(set_to_none)
        known = self.__dict__.pop("_with_gradient", None)
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' parameters have one, and none is for this
            for parameter in _parameters(self) if known is None else known:
                parameter.grad = None


_PLAIN = {nn.Module.train, PreTrainedModel.train, Walked.train}  # they do nothing where every flag is set already


def _levels(root: nn.Module) -> Iterator[list[nn.Module]]:
    """Those of `root.modules()` by their depth, one that several hold maybe twice. They are not kept from one step to
    the next: to look whether they are the same would take as long."""
    level, seen = [root], set[nn.Module]()
    while level:
        known = len(seen)
        seen.update(level)
        if len(seen) == known:  # a module that is in itself
            return
        yield level
        level = [
            child for module in level if (members := module._modules) for child in members.values() if child is not None
        ]


def _with_mode(root: nn.Module) -> list[nn.Module]:
    """Those of `root.modules()` that may compute by their mode: all but what LoRA's layers have beside the layer that
    they are around, which are four in five and linear maps; of those the dropout."""
    found, beside = list[nn.Module](), set[nn.Module]()
    for level in _levels(root):
        for module in level:
            members = module._modules.items()
            if module in beside:
                beside.update(child for _, child in members if child is not None)
                if not (isinstance(module, nn.Dropout) and module.p):
                    continue
            elif isinstance(module, LoraLayer):
                beside.update(child for name, child in members if child is not None and name != "base_layer")
            found.append(module)
    return found


def _parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    for level in _levels(root):
        for module in level:
            if members := module._parameters:
                yield from (parameter for parameter in members.values() if parameter is not None)


def _is_set(modules: list[nn.Module], mode: bool) -> bool:
    """Whether `train(mode)` would change none of `modules`."""
    for module in modules:
        names = module.__dict__
        if names.get("training") is not mode or "train" in names:
            return False
    return all(cls.train in _PLAIN for cls in set(map(type, modules)))
