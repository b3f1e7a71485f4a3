"""A linear layer of the model, with what PEFT and bitsandbytes made of it, as the tensors that the ops read."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import bnb as lora_over_bnb
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from steep.model.fp8_linear import Fp8Linear
from steep.ops.base_weight import BaseWeight, DenseWeight
from steep.ops.int8 import Int8Weight
from steep.ops.lora import Lora, Projection
from steep.ops.nf4 import Nf4Weight

_RECORDING = "transformers.utils.output_capturing"


class Unfused(Exception):
    """Something in the model, or in a call, that the fused forward does not compute. Its text is the reason."""


def projection(module: Any, name: str) -> Projection:
    """The frozen weight and the active adapters of the linear layer `module`. Hooks are not looked for here.

    Args:
        name: what the layer is called in a reason.

    Raises:
        Unfused: it holds what plain LoRA over a frozen weight does not.
    """
    if not isinstance(module, LoraLayer):
        return Projection(base_weight(module, name), module.bias, ())
    if type(module) not in (lora.Linear, lora_over_bnb.Linear4bit, lora_over_bnb.Linear8bitLt):
        raise Unfused(f"{name} is a {type(module).__name__} of PEFT")
    base: Any = module.get_base_layer()
    adapters: tuple[Lora, ...] = ()
    if module.merged:  # with adapters off too: PEFT takes it out of the weight then
        raise Unfused(f"{name} has an adapter merged into it")
    if not module.disable_adapters:
        adapters = tuple(_lora(module, adapter, name) for adapter in module.active_adapters if adapter in module.lora_A)
    return Projection(base_weight(base, name), base.bias, adapters)


def base_weight(module: Any, name: str) -> BaseWeight:
    """The weight of a plain or quantised `nn.Linear`."""
    if isinstance(module, Linear8bitLt):
        weight: Any = module.weight
        stored: Any = module.state if weight.CB is None else weight
        return Int8Weight(stored.CB, stored.SCB)
    if not isinstance(module, nn.Linear):
        raise Unfused(f"{name} is a {type(module).__name__}")
    if isinstance(module, Linear4bit):
        return _nf4(module.weight)
    if isinstance(module, Fp8Linear):
        return module.stored
    if type(module) is not nn.Linear:
        raise Unfused(f"{name} is a {type(module).__name__}")
    return DenseWeight(module.weight)


def in_use(module: Any) -> Any:
    """What PEFT's wrapper around a module that is trained whole calls now: the trained copy, or the original. Any other
    module is itself."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    active = (
        [] if module.disable_adapters else [each for each in module.active_adapters if each in module.modules_to_save]
    )
    return module.modules_to_save[active[0]] if active else module.original_module


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The hooks that a call of `module` runs, in the dictionaries that hold them from now on."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def refuse_hooks(module: nn.Module, name: str, *, but: str | None = None) -> None:
    """The fused forward reads a module's tensors and never calls it: a hook on it would be passed over in silence.

    PEFT's `adapter_names`, one adapter for each row, works by such hooks. Those that transformers leaves behind once
    hidden states were asked for do nothing in a call that asks for none.

    Args:
        but: hooks from packages whose name begins so are let be.
    """
    if _has_any_global_hook():
        raise Unfused("torch has hooks on every module")
    sources = (getattr(hook, "__module__", None) or "" for hooks in hooks_of(module) for hook in hooks.values())
    if any(not (source == _RECORDING or (but and source.startswith(but))) for source in sources):
        raise Unfused(f"{name} has hooks")
    refuse_own_forward(module, name)


def refuse_own_forward(module: nn.Module, name: str) -> None:
    """One that was set on `module` itself comes before its class's, whatever class is set."""
    if "forward" in module.__dict__:
        raise Unfused(f"the forward of {name} was replaced")


def _lora(module: Any, adapter: str, name: str) -> Lora:
    if adapter in module.lora_variant:
        raise Unfused(f"{name} has {type(module.lora_variant[adapter]).__name__.removesuffix('LinearVariant')}")
    if getattr(module, "fan_in_fan_out", False):
        raise Unfused(f"{name} is stored transposed")
    dropout: Any = module.lora_dropout[adapter]
    if dropout.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0:
        raise Unfused(f"{name} has LoRA dropout")
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        raise Unfused(f"{name} has a {type(a).__name__} in its adapter")
    if b.bias is not None:
        raise Unfused(f"{name} has lora_bias")
    return Lora(a.weight, b.weight, module.scaling[adapter])


def _nf4(weight: Any) -> Nf4Weight:
    state = weight.quant_state
    nested = state.state2 if state.nested else None
    return Nf4Weight(
        codes=weight.data,
        absmax=state.absmax,
        table=state.code,
        shape=(state.shape[0], state.shape[1]),
        block_size=state.blocksize,
        code_book=nested.code if nested else None,
        nested_absmax=nested.absmax if nested else None,
        offset=state.offset if nested else None,
        nested_block_size=nested.blocksize if nested else 256,
    )


def compute_dtype(module: Any, stream: torch.Tensor) -> torch.dtype:
    """What products with a linear layer run in: autocast's dtype, the layer's own with weights in 4 bit or e4m3,
    the weight's, or, with weights in int8, that of the residual `stream`."""
    if torch.is_autocast_enabled(stream.device.type):
        return torch.get_autocast_dtype(stream.device.type)
    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(base, Linear4bit | Fp8Linear) and base.compute_dtype is not None:
        return base.compute_dtype
    return base.weight.dtype if base.weight.dtype.is_floating_point else stream.dtype
