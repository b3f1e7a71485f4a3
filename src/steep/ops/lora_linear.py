"""A linear layer with adapters, differentiable in its input and in the adapters that train.

    y = x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ        one product, rounded once (ops/lora.py; ops/fp8_linear.py)

Saved for the backward pass: x and the adapters. The weight is dequantised again (x quantised again, over one in e4m3),
and x·Aᵀ computed again.
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
from steep.ops.fp8 import Fp8Rows
from steep.ops.lora import Group, LoraGroup, Projection
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
    return linears(x, LoraGroup(projections, x.dtype))


def linears(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[T, in_features] -> [T, sum of out_features], by a group for products in x's dtype."""
    tensors = [tensor for projection in group.projections for tensor in projection.tensors()]
    return _Linears.apply(x, group, *tensors)  # pyright: ignore[reportReturnType]


def extended(x: torch.Tensor, group: Group, buffer: Any, quantised: Fp8Rows | None = None) -> torch.Tensor:
    """The group's input rows [T, input_width] of x, which is written into `quantised` too."""
    xe = x.new_empty(x.shape[0], group.input_width)
    _copy_into(xe[:, group.x_columns], x, quantised)
    group.extend_input(xe, buffer)
    return xe


def extended_gradient(dy: torch.Tensor, group: Group, buffer: Any, quantised: Fp8Rows | None = None) -> torch.Tensor:
    """The group's gradient rows [T, gradient_width] of dy, which is written into `quantised` too."""
    dye = dy.new_empty(dy.shape[0], group.gradient_width)
    _copy_into(dye[:, : group.outputs], dy, quantised)
    group.extend_gradient(dye, buffer)
    return dye


def _copy_into(columns: torch.Tensor, x: torch.Tensor, quantised: Fp8Rows | None) -> None:
    """Write `x`, of any strides, into columns of a wider buffer, and into `quantised`."""
    copy_rows(x if x.stride(1) == 1 else x.contiguous(), columns, quantised=quantised)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, *tensors: torch.Tensor) -> torch.Tensor:
        tokens, device = x.shape[0], x.device
        with without_autocast(device.type), sums_in_fp32():
            buffer = group.filled_buffer(device)
            y = x.new_empty(tokens, group.outputs)
            rows = group.quantised_input(tokens, device)
            group.forward(extended(x, group, buffer, rows), buffer, y, quantised=rows)
        ctx.group = group
        ctx.save_for_backward(x, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,), x, group = gradients, ctx.saved_tensors[0], ctx.group
        dx = None
        with without_autocast(x.device.type), sums_in_fp32():
            buffer = group.filled_buffer(x.device)
            rows = group.quantised_gradient(len(dy), x.device) if ctx.needs_input_grad[0] else None
            dye = extended_gradient(dy, group, buffer, rows)
            if ctx.needs_input_grad[0]:
                dx = group.input_gradient(dye, buffer, quantised=rows)
            return dx, None, *group.adapter_gradients(dye, extended(x, group, buffer))
