"""A model that walks fast through its modules: transformers' Trainer sets the mode and the gradients of all of them at
each step, and nn.Module's own way takes milliseconds for thousands, while the GPU may have nothing to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel


class Walked(nn.Module):
    """An installed model, or PEFT's wrapper around one."""

    def train(self, mode: bool = True) -> Self:
        if not all(_is_set(level, mode) for level in _levels(self)):
            super().train(mode)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            return super().zero_grad(set_to_none)
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' parameters have one, and none is for this
            for level in _levels(self):
                for module in level:
                    if members := module._parameters:
                        for parameter in members.values():
                            if parameter is not None:
                                parameter.grad = None


_PLAIN = {nn.Module.train, PreTrainedModel.train, Walked.train}  # they do nothing where every flag is set already


def _levels(root: nn.Module) -> Iterator[list[nn.Module]]:
    """Those of `root.modules()` by their depth, one that several hold maybe twice. Nothing is kept for the next call:
    to look whether it still holds would take as long."""
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


def _is_set(modules: list[nn.Module], mode: bool) -> bool:
    """Whether `train(mode)` would change none of `modules`."""
    for module in modules:
        names = module.__dict__
        if names.get("training") is not mode or "train" in names:
            return False
    return all(cls.train in _PLAIN for cls in set(map(type, modules)))
