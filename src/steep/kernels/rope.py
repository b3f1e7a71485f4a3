"""Rotary position embedding of the q and k heads of a token, in place: a token a program, all its heads."""

# pyright: reportCallIssue=false, reportReturnType=false
# (a launch takes options; next_power_of_2 of a plain number is one)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from steep.kernels import variants
from steep.kernels.compilation import Compilation, triton_type


@cache
def configuration(num_heads: int, half: int) -> tuple[int, int, int]:
    """(HEADS_BLOCK, HALF_BLOCK, num_warps) to rotate `num_heads` heads by `half` angles: 32 pairs a thread."""
    heads_block, half_block = triton.next_power_of_2(num_heads), triton.next_power_of_2(half)
    return heads_block, half_block, min(max(heads_block * half_block // 1024, 1), 16)


@triton.jit
def rotate_kernel(
    qkv,
    cos,
    sin,
    qkv_stride,
    cos_stride,
    sin_stride,
    NUM_HEADS: tl.constexpr,  # of q and k together
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    angle = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < NUM_HEADS) & (angle < HALF)
    pointer = qkv + token * qkv_stride + head * HEAD_DIM + angle
    first = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(pointer + HALF, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(cos + token * cos_stride + angle, mask=angle < HALF, other=0.0)
    sine = tl.load(sin + token * sin_stride + angle, mask=angle < HALF, other=0.0)
    if INVERSE:
        sine = -sine
    tl.store(pointer, (first * cosine - second * sine).to(qkv.dtype.element_ty), mask=inside)
    tl.store(pointer + HALF, (second * cosine + first * sine).to(qkv.dtype.element_ty), mask=inside)


def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, head_dim: int, inverse: bool
) -> None:
    """Rotate the first `num_heads` heads of each row of `qkv` by the angles (`inverse`: by their negatives)."""
    half = cos.shape[1]
    heads_block, half_block, num_warps = configuration(num_heads, half)
    strides = qkv.stride(0), cos.stride(0), sin.stride(0)
    variants.launch(
        rotate_kernel,
        (qkv.shape[0], 1, 1),
        (qkv, cos, sin),
        (*strides, num_heads, head_dim, half, inverse, heads_block, half_block),
        num_warps=num_warps,
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernel is launched for q and k in `dtype`: Llama-3-8B's heads, and Gemma's wide ones backwards."""
    signature = {"qkv": triton_type(dtype), "cos": "*fp32", "sin": "*fp32"}
    signature |= dict.fromkeys(("qkv_stride", "cos_stride", "sin_stride"), "i32")
    found = []
    for num_heads, head_dim, inverse in ((40, 128, False), (12, 256, True)):
        heads_block, half_block, num_warps = configuration(num_heads, head_dim // 2)
        constants = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "HALF": head_dim // 2, "INVERSE": inverse}
        constants |= {"HEADS_BLOCK": heads_block, "HALF_BLOCK": half_block}
        found.append(Compilation(rotate_kernel, signature, constants, num_warps))
    return found
