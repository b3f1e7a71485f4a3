"""Gated activations, silu or tanh-gelu of the gate times up, and their gradients in place.

Both activations are gate · sigmoid(z): z = gate for silu, z = 2·sqrt(2/π)·(gate + 0.044715·gate³) for tanh-gelu, since
(1 + tanh(z/2)) / 2 = sigmoid(z). So one exponential serves both, of -|z|, which never overflows.
"""

# pyright: reportCallIssue=false
# (a launch takes options)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steep.kernels import variants
from steep.kernels.compilation import Compilation, triton_type

FORWARD_BLOCK, FORWARD_WARPS = 2048, 4
BACKWARD_BLOCK, BACKWARD_WARPS = 1024, 4  # 2,048 elements lost: 0.48 against 0.18 ms at 4096 x 14336 on an H200


@triton.jit
def sigmoid_of(gate, IS_GELU: tl.constexpr):
    """The factor that makes the activation out of its gate."""
    z = gate
    if IS_GELU:
        z *= 1.5957691216057308 * (1.0 + 0.044715 * gate * gate)
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def forward_kernel(
    gate_up,
    h,
    gate_up_stride,
    h_stride,
    INTERMEDIATE: tl.constexpr,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks_a_row: tl.constexpr = (INTERMEDIATE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_a_row).to(tl.int64)
    column = tl.program_id(0) % blocks_a_row * BLOCK + tl.arange(0, BLOCK)
    inside = column < INTERMEDIATE
    pointer = gate_up + row * gate_up_stride + column
    gate = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pointer + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
    sigmoid = sigmoid_of(gate, IS_GELU)
    tl.store(h + row * h_stride + column, (gate * sigmoid * up).to(h.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dh,  # becomes h
    gate_up,  # become their gradients
    dh_stride,
    gate_up_stride,
    INTERMEDIATE: tl.constexpr,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks_a_row: tl.constexpr = (INTERMEDIATE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_a_row).to(tl.int64)
    column = tl.program_id(0) % blocks_a_row * BLOCK + tl.arange(0, BLOCK)
    inside = column < INTERMEDIATE
    pointer = gate_up + row * gate_up_stride + column
    h_pointer = dh + row * dh_stride + column
    gate = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pointer + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(h_pointer, mask=inside, other=0.0).to(tl.float32)
    sigmoid = sigmoid_of(gate, IS_GELU)
    activated = gate * sigmoid
    slope = activated * (1.0 - sigmoid)
    if IS_GELU:
        slope *= 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    tl.store(h_pointer, (activated * up).to(dh.dtype.element_ty), mask=inside)
    dgate = gradient * up * (sigmoid + slope)
    tl.store(pointer, dgate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(pointer + INTERMEDIATE, (gradient * activated).to(gate_up.dtype.element_ty), mask=inside)


def forward(gate_up: torch.Tensor, intermediate: int, is_gelu: bool, h: torch.Tensor) -> None:
    """h [T, I] = activation(gate) · up, of gate_up [T, >= 2·I]."""
    variants.launch(
        forward_kernel,
        (gate_up.shape[0] * -(-intermediate // FORWARD_BLOCK), 1, 1),
        (gate_up, h),
        (gate_up.stride(0), h.stride(0), intermediate, is_gelu, FORWARD_BLOCK),
        num_warps=FORWARD_WARPS,
    )


def backward(dh: torch.Tensor, gate_up: torch.Tensor, intermediate: int, is_gelu: bool) -> None:
    """In place: dh becomes h, gate and up become their gradients."""
    variants.launch(
        backward_kernel,
        (gate_up.shape[0] * -(-intermediate // BACKWARD_BLOCK), 1, 1),
        (dh, gate_up),
        (dh.stride(0), gate_up.stride(0), intermediate, is_gelu, BACKWARD_BLOCK),
        num_warps=BACKWARD_WARPS,
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernels are launched in `dtype`: Llama-3-8B's silu, and Gemma-3-4B's gelu."""
    kind = triton_type(dtype)
    signature = {"gate_up": kind, "h": kind, "dh": kind}
    signature |= dict.fromkeys(("gate_up_stride", "h_stride", "dh_stride"), "i32")
    found = []
    for intermediate, is_gelu in ((14336, False), (10240, True)):
        constants = {"INTERMEDIATE": intermediate, "IS_GELU": is_gelu}
        found += [
            Compilation(forward_kernel, signature, constants | {"BLOCK": FORWARD_BLOCK}, FORWARD_WARPS),
            Compilation(backward_kernel, signature, constants | {"BLOCK": BACKWARD_BLOCK}, BACKWARD_WARPS),
        ]
    return found
