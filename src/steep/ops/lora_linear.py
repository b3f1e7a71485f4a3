"""A linear layer with adapters, differentiable in its input and in the adapters that train.

    y = x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ        one product, rounded once (ops/lora.py)

Saved for the backward pass: x and the adapters. The weight is dequantised again, and x·Aᵀ computed again.
The fused decoder layer does not call this: it runs the same `LoraGroup` inside its own pass (model/attention_half.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from steep.ops.backend import without_autocast
from steep.ops.copy_rows import copy_rows
from steep.ops.lora import LoraGroup, Projection
from steep.ops.products import sums_in_fp32


def lora_linear_reference(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """[T, in_features] -> [T, out_features] as libraries do it: each product rounded to x's dtype, then added."""
    weight = x.new_empty(projection.weight.shape)
    projection.weight.write(weight)
    y = linear(x, weight, None if projection.bias is None else projection.bias.to(x.dtype))
    for adapter in projection.adapters:
        y = y + linear(linear(x, adapter.a.to(x.dtype)), adapter.b.to(x.dtype)) * adapter.scale
    return y


def lora_linear(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """[T, in_features] -> [T, out_features], in x's dtype, which is that of the products too."""
    return lora_linears(x, (projection,))


def lora_linears(x: torch.Tensor, projections: Sequence[Projection]) -> torch.Tensor:
    """[T, in_features] -> [T, sum of out_features]: projections that read the same x, as one group."""
    tensors = [tensor for projection in projections for tensor in projection.tensors()]
    return _LoraLinears.apply(x, tuple(projections), *tensors)  # pyright: ignore[reportReturnType]


def extended(x: torch.Tensor, group: LoraGroup, buffer: torch.Tensor) -> torch.Tensor:
    """The group's input rows [T, input_width] of x."""
    xe = x.new_empty(x.shape[0], group.input_width)
    _copy_into(xe[:, group.x_columns], x)
    group.extend_input(xe, buffer)
    return xe


def extended_gradient(dy: torch.Tensor, group: LoraGroup, buffer: torch.Tensor) -> torch.Tensor:
    """The group's gradient rows [T, gradient_width] of dy."""
    dye = dy.new_empty(dy.shape[0], group.gradient_width)
    _copy_into(dye[:, : group.outputs], dy)
    group.extend_gradient(dye, buffer)
    return dye


def _copy_into(columns: torch.Tensor, x: torch.Tensor) -> None:
    """Write `x`, of any strides, into columns of a wider buffer."""
    copy_rows(x if x.stride(1) == 1 else x.contiguous(), columns)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, projections: tuple[Projection, ...], *tensors: torch.Tensor) -> torch.Tensor:
        with without_autocast(x.device.type), sums_in_fp32():
            group = LoraGroup(projections, x.dtype)
            buffer = group.filled_buffer(x.device)
            y = x.new_empty(x.shape[0], group.outputs)
            group.forward(extended(x, group, buffer), buffer, y)
        ctx.group = group
        ctx.save_for_backward(x, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,), x, group = gradients, ctx.saved_tensors[0], ctx.group
        with without_autocast(x.device.type), sums_in_fp32():
            buffer = group.filled_buffer(x.device)
            dye = extended_gradient(dy, group, buffer)
            dx = group.input_gradient(dye, buffer) if ctx.needs_input_grad[0] else None
            return dx, None, *group.adapter_gradients(dye, extended(x, group, buffer))
