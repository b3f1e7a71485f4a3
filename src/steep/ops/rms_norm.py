"""RMS norm (Zhang and Sennrich 2019): w · x / sqrt(mean(x²) + eps), with a frozen weight.

Llama's form multiplies by w, Gemma's by 1 + w. All arithmetic is in fp32, and the result is rounded once: transformers'
Llama rounds before it multiplies by w. With n = x / sqrt(mean(x²) + eps) and g = dy · w, backward is
dx = (g - n · mean(g · n)) / sqrt(mean(x²) + eps); nothing but x is needed for it.

Shapes: T tokens, H hidden. The rows of every [T, H] argument may be apart (columns of a wider buffer).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from steep.ops.backend import uses_kernels, vjp
from steep.ops.fp8 import Fp8Rows, quantise_reference


def _in_fp32(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    x = x.float()
    scale = weight.float() + 1 if unit_offset else weight.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    unit_offset: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """norm(x) in the dtype of x, or residual + norm(x) in that of the residual."""
    normed = _in_fp32(x, weight, eps, unit_offset)
    return normed.to(x.dtype) if residual is None else (residual.float() + normed).to(residual.dtype)


def _check(weight: torch.Tensor, x: torch.Tensor, *others: torch.Tensor | None) -> None:
    assert weight.shape == x.shape[1:] and weight.is_contiguous(), weight.shape
    for tensor in (x, *others):
        assert tensor is None or (tensor.shape == x.shape and tensor.stride(1) == 1), (tensor.shape, tensor.stride())


def rms_norm_forward(
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    quantised: Fp8Rows | None = None,
) -> torch.Tensor:
    """norm(x), or residual + norm(x) as after Gemma's attention and MLP.

    Args:
        weight_H: bf16, fp16 or fp32, whatever x is.
        unit_offset: multiply by 1 + weight (Gemma).
        residual: [T, H], of any of these dtypes.
        out: where to write [T, H], in its own dtype; may be `x_TH` or `residual`.
        out_dtype: without `out`; default: that of `residual`, else of x.
        quantised: where to write the result in e4m3 too, from fp32.
    """
    if out is None:
        out = torch.empty_like(
            x_TH if residual is None else residual, dtype=out_dtype, memory_format=torch.contiguous_format
        )
    _check(weight_H, x_TH, residual, out)
    if uses_kernels(x_TH):
        from steep.kernels import rms_norm as kernels

        kernels.forward(x_TH, weight_H, eps, unit_offset, residual, out, quantised and quantised.parts(*x_TH.shape))
        return out
    normed = _in_fp32(x_TH, weight_H, eps, unit_offset)
    result = normed if residual is None else residual.float() + normed
    if quantised is not None:
        quantise_reference(result, quantised)
    return out.copy_(result)


def rms_norm_backward(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    add: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    quantised: Fp8Rows | None = None,
) -> torch.Tensor:
    """add + the gradient by x. There is no gradient by the weight: it is frozen.

    Args:
        add: [T, H], the gradient of the residual stream that x was read from.
        out: where to write [T, H], in its own dtype (default: that of x); may be `add` or `dy_TH`.
        quantised: where to write the result in e4m3 too, from fp32.
    """
    if out is None:
        out = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    _check(weight_H, x_TH, dy_TH, add, out)
    if uses_kernels(x_TH):
        from steep.kernels import rms_norm as kernels

        rows = quantised and quantised.parts(*x_TH.shape)
        kernels.backward(dy_TH, x_TH, weight_H, eps, unit_offset, add, out, rows)
        return out
    (dx,) = vjp(lambda x: _in_fp32(x, weight_H, eps, unit_offset), (x_TH.float(),), dy_TH.float())
    result = dx if add is None else add.float() + dx
    if quantised is not None:
        quantise_reference(result, quantised)
    return out.copy_(result)


class _RMSNorm(torch.autograd.Function):
    """Saves x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool, residual: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.unit_offset = eps, unit_offset
        return rms_norm_forward(x, weight, eps, unit_offset=unit_offset, residual=residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx = None
        if ctx.needs_input_grad[0]:
            x, weight = ctx.saved_tensors
            dx = rms_norm_backward(dy.contiguous(), x, weight, ctx.eps, unit_offset=ctx.unit_offset)
        return dx, None, None, None, dy if ctx.needs_input_grad[4] else None


def rms_norm(
    x_TH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Differentiable `rms_norm_forward`, by x and by the residual.

    Raises:
        ValueError: the weight requires a gradient.
    """
    if weight_H.requires_grad:
        raise ValueError("the weight of the norm requires a gradient, and rms_norm gives none: freeze it")
    return _RMSNorm.apply(x_TH, weight_H, eps, unit_offset, residual)  # pyright: ignore[reportReturnType]
