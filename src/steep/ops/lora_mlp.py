"""The gated MLP with adapters, differentiable in its input and in the adapters that train.

    gate, up = x·Wᵀ       h = act(gate)·up       y = h·Wᵀ        each W with its adapters, in one product (ops/lora.py)

Saved for the backward pass: x, gate and up, and the adapters. h is computed again where the activation's backward pass
goes over gate and up anyway; `down` is not computed again, nor are gate and up.
The fused decoder layer does not call this: it runs the same two `LoraGroup`s inside its own pass (model/mlp_half.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from steep.ops.backend import without_autocast
from steep.ops.copy_rows import copy_rows
from steep.ops.lora import LoraGroup, Projection
from steep.ops.lora_linear import extended, extended_gradient, lora_linear_reference
from steep.ops.products import sums_in_fp32
from steep.ops.swiglu import Activation, gated_backward, gated_forward, gated_reference


def lora_mlp_reference(
    x: torch.Tensor, gate: Projection, up: Projection, down: Projection, activation: Activation
) -> torch.Tensor:
    """[T, H] -> [T, H], step by step."""
    gate_up = torch.cat([lora_linear_reference(x, gate), lora_linear_reference(x, up)], dim=1)
    return lora_linear_reference(gated_reference(gate_up, gate.weight.shape[0], activation), down)


def lora_mlp(
    x: torch.Tensor, gate: Projection, up: Projection, down: Projection, activation: Activation
) -> torch.Tensor:
    """[T, H] -> [T, H], in x's dtype, which is that of the products too."""
    tensors = gate.tensors() + up.tensors() + down.tensors()
    return _LoraMlp.apply(x, gate, up, down, activation, *tensors)  # pyright: ignore[reportReturnType]


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate: Projection,
        up: Projection,
        down: Projection,
        activation: Activation,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        with without_autocast(x.device.type), sums_in_fp32():
            first, second = LoraGroup((gate, up), x.dtype), LoraGroup((down,), x.dtype)
            buffer = first.filled_buffer(x.device)
            gate_up = x.new_empty(x.shape[0], first.outputs)
            first.forward(extended(x, first, buffer), buffer, gate_up)
            del buffer  # before the next is made

            buffer = second.filled_buffer(x.device)
            he = x.new_empty(x.shape[0], second.input_width)
            gated_forward(gate_up, gate.weight.shape[0], activation, out=he[:, second.x_columns])
            second.extend_input(he, buffer)
            y = x.new_empty(x.shape[0], second.outputs)
            second.forward(he, buffer, y)

        ctx.groups, ctx.activation = (first, second), activation
        ctx.save_for_backward(x, gate_up, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,), (x, gate_up, *_), (first, second) = gradients, ctx.saved_tensors, ctx.groups
        with without_autocast(x.device.type), sums_in_fp32():
            buffer = second.filled_buffer(x.device)
            dye = extended_gradient(dy, second, buffer)
            he = x.new_empty(x.shape[0], second.input_width)
            h = second.input_gradient(dye, buffer, out=he[:, second.x_columns])  # dh, which becomes h
            d_gate_up = x.new_empty(x.shape[0], first.gradient_width)
            copy_rows(gate_up, d_gate_up[:, : first.outputs])  # which become their gradients
            gated_backward(h, d_gate_up, first.outputs // 2, ctx.activation)
            second.extend_input(he, buffer)
            of_down = second.adapter_gradients(dye, he)
            del buffer, dye, he, h

            buffer = first.filled_buffer(x.device)
            first.extend_gradient(d_gate_up, buffer)
            dx = first.input_gradient(d_gate_up, buffer) if ctx.needs_input_grad[0] else None
            of_gate_up = first.adapter_gradients(d_gate_up, extended(x, first, buffer))
            return dx, None, None, None, None, *of_gate_up, *of_down
