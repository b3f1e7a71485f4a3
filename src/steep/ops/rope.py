"""Rotary position embedding (Su et al. 2021) in Llama's convention: a head's first half turns against its second.

With x1 the first R/2 and x2 the next R/2 elements of a head, (x1, x2) becomes (x1·cos - x2·sin, x2·cos + x1·sin); what
comes after R stays (partial rotary). cos and sin are those that the model made, scaled as it scales them. A rotation's
gradient is the rotation back (by a factor where cos and sin are scaled), so backward is forward with negated sines.

Shapes: T tokens, C = (NH + 2·NK)·D columns: q heads, k heads, v heads. The rows of every argument may be apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from steep.ops.backend import uses_kernels
from steep.ops.fp8 import BLOCK, Fp8Rows, quantise_reference


def rope_reference(
    qkv_TC: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> torch.Tensor:
    """A new [T, C] whose q and k heads are rotated, in fp32 and rounded once; for the arguments see `rope_forward`."""
    heads = qkv_TC.unflatten(1, (-1, head_dim)).float()
    half = cos_TR.shape[1]
    first, second, rest = heads.split((half, half, head_dim - 2 * half), -1)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
    num_rotated = num_heads + num_kv_heads
    return torch.cat((rotated[:, :num_rotated], heads[:, num_rotated:]), 1).flatten(1).to(qkv_TC.dtype)


def _rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    inverse: bool,
    quantised: Fp8Rows | None = None,
) -> torch.Tensor:
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim and qkv.stride(1) == 1, qkv.shape
    for angles in (cos, sin):
        assert angles.dtype == torch.float32 and angles.stride(1) == 1, (angles.dtype, angles.stride())
        assert angles.shape == (qkv.shape[0], cos.shape[1]) and 2 * cos.shape[1] <= head_dim, angles.shape
    if uses_kernels(qkv):
        from steep.kernels import rope as kernels

        if quantised is None:
            kernels.rotate(qkv, cos, sin, num_heads + num_kv_heads, head_dim, inverse)
        else:
            kernels.rotate_back(qkv, cos, sin, num_heads + num_kv_heads, head_dim, quantised.parts(*qkv.shape))
        return qkv
    rotated = rope_reference(qkv.float(), cos, -sin if inverse else sin, num_heads, num_kv_heads, head_dim)
    if quantised is not None:
        quantise_reference(rotated, quantised)
    return qkv.copy_(rotated)


def rope_forward(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> torch.Tensor:
    """Rotate the q and k heads of `qkv` in place, and return it; v is not touched.

    Args:
        qkv: [T, (num_heads + 2 · num_kv_heads) · head_dim], bf16, fp16 or fp32.
        cos, sin: [T, R/2] fp32 with R <= head_dim: one angle a pair (the first half of transformers' cos and sin).
    """
    return _rotate(qkv, cos, sin, num_heads, num_kv_heads, head_dim, inverse=False)


def check_pieces(quantised: Fp8Rows | None, head_dim: int) -> None:
    """Pieces of 128 columns are those of a head, or heads those of a piece."""
    assert quantised is None or not quantised.has_pieces or head_dim % BLOCK == 0 or BLOCK % head_dim == 0, head_dim


def rope_backward(
    dqkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    quantised: Fp8Rows | None = None,
) -> torch.Tensor:
    """Turn the gradient of what `rope_forward` returns into that of its input, in place, and return it.

    Args:
        quantised: where to write it in e4m3 too, from fp32, the v heads with it. In pieces only where head_dim divides
            128 or is a multiple of it.
    """
    check_pieces(quantised, head_dim)
    return _rotate(dqkv, cos, sin, num_heads, num_kv_heads, head_dim, inverse=True, quantised=quantised)


class _Rope(torch.autograd.Function):
    """Saves cos and sin."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *heads: int) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return rope_forward(qkv.clone(memory_format=torch.contiguous_format), cos, sin, *heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dqkv: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dqkv = dqkv.clone(memory_format=torch.contiguous_format)  # autograd may hand the same gradient to others
        return rope_backward(dqkv, cos, sin, *ctx.heads), None, None, None, None, None


def rope(
    qkv_TC: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> torch.Tensor:
    """Differentiable by qkv, and out of place."""
    return _Rope.apply(qkv_TC, cos_TR, sin_TR, num_heads, num_kv_heads, head_dim)  # pyright: ignore[reportReturnType]
