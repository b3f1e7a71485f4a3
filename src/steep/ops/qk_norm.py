"""RMS norm of every q and k head, then rotary position embedding: Qwen3's and Gemma 3's order.

The norm is that of `rms_norm`, over a head's D elements, with a frozen weight for q and one for k; the rotation that of
`rope`. Nothing is rounded between the two. Both read qkv raw and write once: forward out of place, since backward needs
the raw q and k, backward in place on the gradient.

Shapes: T tokens, D head_dim, C = (NH + 2·NK)·D columns: q heads, k heads, v heads. The rows of every [T, n] argument
may be apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from steep.ops.backend import uses_kernels, vjp
from steep.ops.fp8 import Fp8Rows, quantise_reference
from steep.ops.rms_norm import rms_norm_reference
from steep.ops.rope import check_pieces, rope_reference


def qk_norm_rope_reference(
    qkv_TC: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    eps: float,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    unit_offset: bool = False,
) -> torch.Tensor:
    """A new [T, C] in the dtype of qkv; for the arguments see `qk_norm_rope_forward`."""
    heads = qkv_TC.unflatten(1, (-1, head_dim)).float()
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    q = rms_norm_reference(q, q_weight_D, eps, unit_offset)
    k = rms_norm_reference(k, k_weight_D, eps, unit_offset)
    normed = torch.cat((q, k, v), 1).flatten(1)
    return rope_reference(normed, cos_TR, sin_TR, num_heads, num_kv_heads, head_dim).to(qkv_TC.dtype)


def _check(
    buffers: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    shape = (buffers[0].shape[0], (num_heads + 2 * num_kv_heads) * head_dim)
    for buffer in buffers:
        assert buffer.shape == shape and buffer.stride(1) == 1, (buffer.shape, buffer.stride())
    for weight in weights:
        assert weight.shape == (head_dim,) and weight.is_contiguous(), weight.shape
    for angle in angles:
        assert angle.dtype == torch.float32 and angle.stride(1) == 1, (angle.dtype, angle.stride())
        assert angle.shape == (shape[0], angles[0].shape[1]) and 2 * angle.shape[1] <= head_dim, angle.shape


def qk_norm_rope_forward(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    unit_offset: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q and k heads normed and rotated, v heads copied.

    Args:
        qkv: [T, (num_heads + 2 · num_kv_heads) · head_dim], bf16, fp16 or fp32.
        q_weight, k_weight: [head_dim], of any of these dtypes.
        cos, sin: [T, R/2] fp32 with R <= head_dim, as of `rope_forward`.
        unit_offset: multiply by 1 + weight (Gemma).
        out: where to write, of the shape of qkv and in its own dtype; not qkv itself.
    """
    if out is None:
        out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _check((qkv, out), (q_weight, k_weight), (cos, sin), num_heads, num_kv_heads, head_dim)
    heads = num_heads, num_kv_heads, head_dim
    if uses_kernels(qkv):
        from steep.kernels import qk_norm as kernels

        kernels.forward(qkv, q_weight, k_weight, eps, cos, sin, *heads, unit_offset, out)
        return out
    return out.copy_(
        qk_norm_rope_reference(qkv.float(), q_weight, k_weight, eps, cos, sin, *heads, unit_offset=unit_offset)
    )


def qk_norm_rope_backward(
    dqkv: torch.Tensor,
    qkv_raw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    unit_offset: bool = False,
    quantised: Fp8Rows | None = None,
) -> torch.Tensor:
    """Turn the gradient of what `qk_norm_rope_forward` returns into that of `qkv_raw`, in place, and return it.

    The v part is not touched. There are no gradients by the weights: they are frozen.

    Args:
        quantised: where to write it in e4m3 too, as of `rope_backward`.
    """
    check_pieces(quantised, head_dim)
    _check((dqkv, qkv_raw), (q_weight, k_weight), (cos, sin), num_heads, num_kv_heads, head_dim)
    heads = num_heads, num_kv_heads, head_dim
    if uses_kernels(dqkv):
        from steep.kernels import qk_norm as kernels

        rows = quantised and quantised.parts(*dqkv.shape)
        kernels.backward(dqkv, qkv_raw, q_weight, k_weight, eps, cos, sin, *heads, unit_offset, rows)
        return dqkv
    (dx,) = vjp(
        lambda x: qk_norm_rope_reference(x, q_weight, k_weight, eps, cos, sin, *heads, unit_offset=unit_offset),
        (qkv_raw.float(),),
        dqkv.float(),
    )
    if quantised is not None:
        quantise_reference(dx, quantised)
    return dqkv.copy_(dx)


class _QKNormRope(torch.autograd.Function):
    """Saves qkv, cos and sin."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        heads: tuple[int, int, int],
        unit_offset: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.eps, ctx.heads, ctx.unit_offset = eps, heads, unit_offset
        return qk_norm_rope_forward(qkv, q_weight, k_weight, eps, cos, sin, *heads, unit_offset=unit_offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dqkv: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        dqkv = dqkv.clone(memory_format=torch.contiguous_format)  # autograd may hand the same gradient to others
        qk_norm_rope_backward(dqkv, qkv, q_weight, k_weight, ctx.eps, cos, sin, *ctx.heads, unit_offset=ctx.unit_offset)
        return dqkv, None, None, None, None, None, None, None


def qk_norm_rope(
    qkv_TC: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    eps: float,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    unit_offset: bool = False,
) -> torch.Tensor:
    """Differentiable `qk_norm_rope_forward`, by qkv.

    Raises:
        ValueError: a weight requires a gradient.
    """
    if q_weight_D.requires_grad or k_weight_D.requires_grad:
        raise ValueError("the weight of a q or k norm requires a gradient, and qk_norm_rope gives none: freeze it")
    heads = (num_heads, num_kv_heads, head_dim)
    args = (qkv_TC, q_weight_D, k_weight_D, eps, cos_TR, sin_TR, heads, unit_offset)
    return _QKNormRope.apply(*args)  # pyright: ignore[reportReturnType]
