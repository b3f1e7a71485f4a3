"""Gated activations of an MLP (Shazeer 2020): h = act(gate) · up, with silu (SwiGLU) or tanh-gelu (GeGLU).

Arithmetic is in fp32, each result is rounded once. Backward works in place, so that a layer's MLP needs no buffer but
gate_up and dh: dh becomes h again (which the gradient of `down` needs), gate and up become their gradients.

Shapes: T tokens, I intermediate. gate_up is [T, >= 2·I]: gate is the first I columns, up the next. Rows may be apart.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from steep.ops.backend import uses_kernels, vjp
from steep.ops.fp8 import BLOCK, Fp8Rows, quantise_reference

Activation = Literal["silu", "gelu_tanh"]


def _in_fp32(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate = gate.float()
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up.float()


def gated_reference(gate_up: torch.Tensor, intermediate: int, activation: Activation) -> torch.Tensor:
    """h [T, I] in the dtype of gate_up."""
    gate, up = gate_up[:, : 2 * intermediate].chunk(2, 1)
    return _in_fp32(gate, up, activation).to(gate_up.dtype)


def _check(gate_up: torch.Tensor, h: torch.Tensor, intermediate: int, activation: str) -> None:
    assert activation in ("silu", "gelu_tanh"), activation
    assert gate_up.shape[1] >= 2 * intermediate and gate_up.stride(1) == 1, (gate_up.shape, gate_up.stride())
    assert h.shape == (gate_up.shape[0], intermediate) and h.stride(1) == 1, (h.shape, h.stride())


def gated_forward(
    gate_up: torch.Tensor,
    intermediate: int,
    activation: Activation,
    out: torch.Tensor | None = None,
    *,
    quantised: Fp8Rows | None = None,
) -> torch.Tensor:
    """h [T, I] = act(gate) · up, into `out` (in its dtype; its rows may be apart) if there is one, and into `quantised`
    in e4m3, from fp32."""
    if out is None:
        out = torch.empty(gate_up.shape[0], intermediate, dtype=gate_up.dtype, device=gate_up.device)
    _check(gate_up, out, intermediate, activation)
    if uses_kernels(gate_up):
        from steep.kernels import swiglu as kernels

        if quantised is None:
            kernels.forward(gate_up, intermediate, activation == "gelu_tanh", out)
        else:
            rows = quantised.parts(*out.shape)
            kernels.forward_quantised(gate_up, intermediate, activation == "gelu_tanh", out, rows)
        return out
    gate, up = gate_up[:, : 2 * intermediate].chunk(2, 1)
    h = _in_fp32(gate, up, activation)
    if quantised is not None:
        quantise_reference(h, quantised)
    return out.copy_(h)


def gated_backward(
    dh: torch.Tensor,
    gate_up: torch.Tensor,
    intermediate: int,
    activation: Activation,
    *,
    quantised: Fp8Rows | None = None,
) -> None:
    """In place: `dh` [T, I] becomes h, and the gate and up columns of `gate_up` become their gradients.

    Args:
        quantised: where to write both gradients [T, 2·I] in e4m3 too, from fp32: a row with one scale, or in pieces,
            none of which may have columns of both (I is a multiple of 128).
    """
    _check(gate_up, dh, intermediate, activation)
    if quantised is not None:
        assert not quantised.has_pieces or intermediate % BLOCK == 0, f"pieces of gate and up, {intermediate} wide each"
    if uses_kernels(gate_up):
        from steep.kernels import swiglu as kernels

        if quantised is None:
            kernels.backward(dh, gate_up, intermediate, activation == "gelu_tanh")
        else:
            rows = quantised.parts(dh.shape[0], 2 * intermediate)
            kernels.backward_quantised(dh, gate_up, intermediate, activation == "gelu_tanh", rows)
        return
    gate, up = gate_up[:, : 2 * intermediate].chunk(2, 1)
    inputs = gate.float(), up.float()
    dgate, dup = vjp(lambda gate, up: _in_fp32(gate, up, activation), inputs, dh.float())
    if quantised is not None:
        quantise_reference(torch.cat((dgate, dup), 1), quantised)
    dh.copy_(_in_fp32(*inputs, activation))
    gate.copy_(dgate)
    up.copy_(dup)


class _Gated(torch.autograd.Function):
    """Saves gate_up."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return gated_forward(gate_up, gate_up.shape[1] // 2, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = ctx.saved_tensors[0].clone(memory_format=torch.contiguous_format)
        gated_backward(
            dh.clone(memory_format=torch.contiguous_format), gradient, gradient.shape[1] // 2, ctx.activation
        )
        return gradient, None


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Differentiable h [T, I] of gate_up [T, 2·I]; nothing is written in place."""
    return _Gated.apply(gate_up, activation)  # pyright: ignore[reportReturnType]
