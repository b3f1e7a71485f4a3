"""What was read of a decoder layer, kept until something of it changes: reading takes ten times as long as looking."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain, repeat
from operator import contains, itemgetter
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from peft.tuners.lora import LoraLayer
from torch import nn

from steep.model.fp8_linear import Fp8Linear
from steep.model.layer import Layer
from steep.model.projections import hooks_of
from steep.model.read_layer import Traits, read_layer
from steep.model.refusals import library_class_of

_OF_CONFIG = ("num_attention_heads", "num_key_value_heads", "sliding_window")  # what reading takes from it


class Reading:
    """A `Layer`, and everything that it was read from.

    Args:
        let_go: called when the layer or a module in it is no more: what was read of it holds memory that nobody
            else does then.

    Raises:
        Unfused: see `read_layer`.
    """

    def __init__(self, module: Any, traits: Traits, let_go: Callable[[Any], object]) -> None:
        self.layer: Layer = read_layer(module, traits)
        parts = list(module.modules())[1:]  # a hook on the layer itself is called
        # Attributes are held, so modules that are in another one too, but never the layer itself: it could not go then.
        self._parts = [weakref.ref(part, let_go) for part in [module, *parts]]
        self._hooks = [hooks for part in parts for hooks in hooks_of(part)]
        self._names = [part.__dict__ for part in parts]
        self._members = [part._modules for part in [module, *parts] if part._modules]
        self._dropouts = [part.__dict__ for part in parts if isinstance(part, nn.Dropout)]
        self._adapted = [part.__dict__ for part in parts if isinstance(part, LoraLayer)]
        self._holders = [part._parameters for part in parts if part._parameters]
        parameters = (parameter for part in parts for parameter in part._parameters.values())
        self._quantised = [parameter.__dict__ for parameter in parameters if isinstance(parameter, Params4bit)]
        self._scales = [part._buffers for part in parts if isinstance(part, Fp8Linear)]
        self._classes: list[Any] = list({type(part): None for part in parts})
        self._owner: Any = library_class_of(module)
        own = [part.__dict__ for part in parts if type(part).__module__ == self._owner.__module__]
        self._numbers = [(_numbers(names), names) for names in own]
        self._attention: dict[str, Any] = module.self_attn.__dict__
        config = self._attention["config"].__dict__
        self._of_config = itemgetter(*(key for key in _OF_CONFIG if key in config))
        self._state = self._now()

    def holds(self) -> bool:
        """Whether reading again would give the same tensors and numbers."""
        if any(map(contains, self._names, repeat("forward"))):
            return False
        try:
            with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' parameters are one, and each is asked twice
                return self._now() == self._state
        except (KeyError, AttributeError):  # a number was deleted, or what a weight was quantised with
            return False

    def _now(self) -> list[Any]:
        # Past nn.Module's own look-up of names, which takes most of the time of a reading.
        state: list[Any] = [self._owner.forward, self._of_config(self._attention["config"].__dict__)]
        state += [cls.forward for cls in self._classes]
        if any(self._hooks):
            state += [hook for hooks in self._hooks for hook in hooks.values()]
        state += [numbers(names) for numbers, names in self._numbers]
        children = [*chain.from_iterable(map(dict[str, Any].values, self._members))]
        state += map(id, children)
        state += map(type, children)  # a class may be set in place
        for names in self._dropouts:
            state += (names["p"], names["training"])
        for names in self._adapted:
            state += (names["_disable_adapters"], tuple(names["_active_adapter"]), tuple(names["merged_adapters"]))
            state += names["scaling"].values()
        for parameters in self._holders:
            for parameter in parameters.values():
                if parameter is not None:
                    state += (
                        id(parameter), parameter.data_ptr(), parameter.requires_grad, parameter.dtype, parameter.shape
                    )  # fmt: skip
        for names in self._quantised:
            quant_state = names["quant_state"]
            state += (id(quant_state), quant_state.absmax.data_ptr())
        for buffers in self._scales:
            scale = buffers["scale"]
            state += (id(scale), scale.data_ptr())  # pyright: ignore[reportOptionalMemberAccess]
        return state


def _numbers(names: dict[str, Any]) -> itemgetter[Any]:
    """A look-up of the attributes that are numbers, or may be."""
    plain = [key for key, value in names.items() if value is None or isinstance(value, bool | int | float | str)]
    return itemgetter(*plain)
