"""A frozen linear layer whose weight is kept in e4m3, and computed with in 16 or 32 bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable

from steep.errors import UserError
from steep.ops.fp8 import BLOCK, E4M3, Fp8Weight

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers that read the same rows, by their names in the module around them."""


class Fp8Linear(nn.Linear):
    """y = x W^T + b over `Fp8Weight`, W rounded once into the dtype that products run in: autocast's, or
    `compute_dtype`. y has the dtype of x, or autocast's.

    No cast reaches the codes or their scales, and every move does: `.to(torch.bfloat16)` sets `compute_dtype`.

    Attributes:
        weight: e4m3 [out_features, in_features], the codes.
        scale: fp32 [out_features], or of blocks of 128 x 128.
        compute_dtype: what products run in; PEFT puts adapters on the layer in it.

    Raises:
        UserError: in `forward`, codes that are to be trained, as PEFT's `modules_to_save` would: they get no gradient.
    """

    scale: torch.Tensor

    def __init__(self, weight: Fp8Weight, bias: torch.Tensor | None, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would draw a weight
        self.out_features, self.in_features = weight.shape
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(weight.codes, requires_grad=False)
        self.register_buffer("scale", weight.scale)
        self.bias = None if bias is None else nn.Parameter(bias.to(compute_dtype), requires_grad=False)

    @property
    def stored(self) -> Fp8Weight:
        """The weight as ops read it, by reference."""
        return Fp8Weight(self.weight.data, self.scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad:
            raise UserError(
                "model",
                f"a layer of {self.out_features} x {self.in_features} is to be trained in e4m3, and gets no gradient",
                "Freeze it, leave it out of modules_to_save, and train an adapter on it; or load the base in 16 bits.",
            )
        device = input.device.type
        with_autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if with_autocast else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y: torch.Tensor = _Product.apply(input.to(dtype), self.weight.data, self.scale, bias)  # pyright: ignore[reportAssignmentType]
        return y if with_autocast else y.to(input.dtype)

    def dequantize(self) -> torch.Tensor:
        """The weight in fp32. PEFT asks a layer with a `W_q` for it, where it needs the weight itself (DoRA): it would
        take codes for numbers else."""
        return _dequantised(self.stored, torch.float32)

    @property
    def W_q(self) -> torch.Tensor:
        return self.weight

    def __getstate__(self) -> dict[str, Any]:
        """The codes as bytes: torch cannot pickle numbers in e4m3 by themselves."""
        state = vars(self).copy()
        state["_parameters"] = {**self._parameters, "weight": self.weight.data.view(torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        codes: Any = self._parameters["weight"]
        self._parameters["weight"] = nn.Parameter(codes.view(E4M3), requires_grad=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Fp8Linear:
        """What `.to()` and its like do to a module. A cast is for floating-point numbers: as integers, codes and scales
        are moved only."""

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dtype == E4M3:
                return _moved(tensor, torch.uint8, fn)
            return _moved(tensor, torch.int32, fn) if tensor is self.scale else fn(tensor)

        super()._apply(kept, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.scale.device)).dtype
        return self

    def extra_repr(self) -> str:
        storage = "blocks of 128 x 128" if self.scale.dim() == 2 else "rows"
        return f"{super().extra_repr()}, e4m3 with scales of {storage}, compute_dtype={self.compute_dtype}"


def stack_groups(model: nn.Module) -> int:
    """Let q, k and v of each layer, and gate and up, lie one behind the other in one tensor, of which each module's
    weight and scale are views: one product can read them. Layer by layer, so that only one is there twice.

    Names, values, `state_dict` and copies are what they were; a move to another device takes the views apart. Groups
    of blocks whose ends are no multiple of 128 rows keep scales of their own.

    Returns:
        How many groups were stacked.
    """
    stacked = 0
    for module in list(model.modules()):
        for names in GROUPS:
            layers = [_base_of(getattr(module, name, None)) for name in names]
            if all(isinstance(layer, Fp8Linear) for layer in layers) and _alike(layers):
                _stack(layers)
                stacked += 1
    return stacked


def refuse_merge(model: nn.Module) -> None:
    """Check that adapters can be merged into the layers that they are on: PEFT changes one after the other, and where
    torch refuses to add to codes, those in 16 bits have theirs in them.

    Raises:
        UserError: one of the layers is in e4m3.
    """
    layers = (module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer))
    if count := sum(isinstance(layer, Fp8Linear) for layer in layers):
        raise UserError(
            "model",
            f"adapters are on {count} layers in e4m3, to which nothing can be added: a difference rounds away there",
            "Merge into the 16-bit original: steep export RUN; or save the adapter, load the base with base='bf16', "
            "and merge with PeftModel.from_pretrained over that.",
        )


class _Product(torch.autograd.Function):
    """x W^T + b, and dx = dy W. W is there while it is multiplied with only: backward makes it once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: Any) -> torch.Tensor:
        ctx.save_for_backward(codes, scale)
        return nn.functional.linear(x, _dequantised(Fp8Weight(codes, scale), x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None]:
        codes, scale = ctx.saved_tensors
        dx = dy @ _dequantised(Fp8Weight(codes, scale), dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None


def _dequantised(weight: Fp8Weight, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    with torch.cuda.device_of(out):  # Triton launches on the current device
        weight.write(out)
    return out


def _moved(tensor: torch.Tensor, integers: torch.dtype, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    as_integers = tensor.view(integers)
    moved = fn(as_integers)
    if moved.dtype != integers:  # of `.type()`, which casts integers too
        moved = as_integers.to(moved.device)
    return moved.view(tensor.dtype)


def _base_of(module: Any) -> Any:
    """`module` without PEFT's layer around it."""
    return getattr(module, "base_layer", module)


def _alike(layers: Sequence[Any]) -> bool:
    first = layers[0]
    return all(
        layer.in_features == first.in_features
        and layer.scale.dim() == first.scale.dim()
        and layer.weight.device == first.weight.device
        for layer in layers
    )


def _stack(layers: Sequence[Any]) -> None:
    rows = [layer.out_features for layer in layers]
    codes = torch.cat([layer.weight.data.view(torch.uint8) for layer in layers]).view(E4M3)
    for layer, own in zip(layers, codes.split(rows), strict=True):
        layer.weight.data = own
    if layers[0].scale.dim() == 1 or all(each % BLOCK == 0 for each in rows[:-1]):
        scale = torch.cat([layer.scale for layer in layers])
        for layer, own in zip(layers, scale.split([len(layer.scale) for layer in layers]), strict=True):
            layer.scale = own
