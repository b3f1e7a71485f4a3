"""What was read of a decoder layer, kept until something of it changes: reading takes ten times as long as looking."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from steep.model.layer import Layer
from steep.model.projections import hooks_of
from steep.model.read_layer import Traits, read_layer


class Reading:
    """A `Layer`, and everything that it was read from.

    Raises:
        Unfused: see `read_layer`.
    """

    def __init__(self, module: Any, traits: Traits) -> None:
        self.layer: Layer = read_layer(module, traits)
        self._module = module
        parts = list(module.modules())[1:]  # a hook on the layer itself is called
        self._hooks = [hooks for part in parts for hooks in hooks_of(part)]
        self._names = [part.__dict__ for part in parts]
        self._members = [part._modules for part in [module, *parts] if part._modules]
        self._dropouts: list[Any] = [part for part in parts if isinstance(part, nn.Dropout)]
        self._adapted: list[Any] = [part for part in parts if isinstance(part, LoraLayer)]
        self._holders = [part for part in parts if part._parameters]
        self._state = self._now(module)

    def holds(self, module: Any) -> bool:
        """Whether reading `module` again would give the same tensors and numbers."""
        if module is not self._module or any(self._hooks) or any("forward" in names for names in self._names):
            return False
        return self._now(module) == self._state

    def _now(self, module: Any) -> list[Any]:
        # Past nn.Module's own look-up of names, which takes most of the time of a reading.
        state: list[Any] = [module.training]
        for members in self._members:
            state += map(id, members.values())
        for dropout in self._dropouts:
            state += (dropout.p, dropout.training)
        for adapted in self._adapted:
            names = adapted.__dict__
            state += [names["_disable_adapters"], list(adapted.active_adapters), list(names["merged_adapters"])]
            state += names["scaling"].values()
        for holder in self._holders:
            for parameter in holder._parameters.values():
                if parameter is not None:
                    state += (id(parameter), parameter.data_ptr(), parameter.requires_grad)
        return state
