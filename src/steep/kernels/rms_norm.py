"""RMS norm: a row a program, the whole row in registers, read once and written once.

The weight is frozen, so backward has one output; it makes the row's statistic again from x, which it reads anyway.
Either can write its result in e4m3 too, for a product to read: the row is there already.
"""

# pyright: reportCallIssue=false, reportReturnType=false
# (a launch takes options; next_power_of_2 of a plain number is one)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steep.kernels import OLDEST_FP8_CARD, variants
from steep.kernels.compilation import Compilation, triton_type
from steep.kernels.fp8_rows import NO_ROWS, Rows, sharing, store_columns, whole_row


@triton.jit
def rms_norm_kernel(
    x,
    weight,
    residual,  # or None
    out,
    codes,  # or None
    code_scale,  # or None
    factors,  # or None
    x_stride,
    residual_stride,
    out_stride,
    codes_stride,
    eps,
    HIDDEN: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        scale += 1.0
    result = values * tl.rsqrt(tl.sum(values * values, axis=0) / HIDDEN + eps) * scale
    if residual is not None:
        result += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=inside)
    if codes is not None:
        scales = code_scale + row * ((HIDDEN + SHARED - 1) // SHARED)
        store_columns(result, 0, HIDDEN, codes + row * codes_stride, scales, factors, BLOCK, SHARED)


@triton.jit
def rms_norm_backward_kernel(
    dy,
    x,
    weight,
    add,  # or None
    out,
    codes,  # or None
    code_scale,  # or None
    factors,  # or None
    dy_stride,
    x_stride,
    add_stride,
    out_stride,
    codes_stride,
    eps,
    HIDDEN: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        scale += 1.0
    gradient *= scale
    rstd = tl.rsqrt(tl.sum(values * values, axis=0) / HIDDEN + eps)
    along = tl.sum(gradient * values, axis=0) / HIDDEN * rstd * rstd  # the part of the gradient that lies along x
    result = (gradient - values * along) * rstd
    if add is not None:
        result += tl.load(add + row * add_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, result.to(out.dtype.element_ty), mask=inside)
    if codes is not None:
        scales = code_scale + row * ((HIDDEN + SHARED - 1) // SHARED)
        store_columns(result, 0, HIDDEN, codes + row * codes_stride, scales, factors, BLOCK, SHARED)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    unit_offset: bool,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    rows: Rows | None,
) -> None:
    """out = (residual +) norm(x) · weight, all [T, H] with rows that may be apart; and in e4m3 into `rows`."""
    num_tokens, hidden = x.shape
    block, num_warps = whole_row(hidden)
    residual_stride = 0 if residual is None else residual.stride(0)
    codes_stride, shared = sharing(rows, block)
    variants.launch(
        rms_norm_kernel,
        (num_tokens, 1, 1),
        (x, weight, residual, out, *(rows or NO_ROWS)),
        (x.stride(0), residual_stride, out.stride(0), codes_stride, eps, hidden, unit_offset, block, shared),
        num_warps=num_warps,
    )


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    unit_offset: bool,
    add: torch.Tensor | None,
    out: torch.Tensor,
    rows: Rows | None,
) -> None:
    """out = (add +) the gradient of `forward` by x; and in e4m3 into `rows`. `out` may be `add` or `dy`: a row is read,
    then written."""
    num_tokens, hidden = x.shape
    block, num_warps = whole_row(hidden)
    add_stride = 0 if add is None else add.stride(0)
    codes_stride, shared = sharing(rows, block)
    variants.launch(
        rms_norm_backward_kernel,
        (num_tokens, 1, 1),
        (dy, x, weight, add, out, *(rows or NO_ROWS)),
        (dy.stride(0), x.stride(0), add_stride, out.stride(0), codes_stride, eps, hidden, unit_offset, block, shared),
        num_warps=num_warps,
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernels are launched for a block input in `dtype`, the residual stream in it or in fp32."""
    kind = triton_type(dtype)
    found = []
    for hidden, unit_offset, stream in ((4096, False, kind), (8192, False, "*fp32"), (2560, True, kind)):
        block, num_warps = whole_row(hidden)
        constants = {"HIDDEN": hidden, "UNIT_OFFSET": unit_offset, "BLOCK": block}
        names = ("x_stride", "residual_stride", "dy_stride", "add_stride", "out_stride", "codes_stride")
        strides = dict.fromkeys(names, "i32")
        common = strides | {"x": stream, "weight": kind, "eps": "fp32"}
        forward_signature = common | {"out": kind, "residual": stream}
        backward_signature = common | {"out": stream, "add": stream, "dy": kind}
        plain = constants | {"codes": None, "code_scale": None, "factors": None, "SHARED": 0}
        found += [
            Compilation(rms_norm_kernel, forward_signature, plain | {"residual": None}, num_warps),
            Compilation(rms_norm_backward_kernel, backward_signature, plain, num_warps),
        ]
        if unit_offset:  # Gemma norms a branch before it is added
            found.append(Compilation(rms_norm_kernel, forward_signature, plain, num_warps))
        rows = {"codes": "*fp8e4nv", "code_scale": "*fp32", "factors": "*fp32"}
        x_rows = constants | {"residual": None, "factors": None, "SHARED": 128 if unit_offset else block}
        dy_rows = constants | {"SHARED": block}
        found += [
            Compilation(rms_norm_kernel, forward_signature | rows, x_rows, num_warps, OLDEST_FP8_CARD),
            Compilation(rms_norm_backward_kernel, backward_signature | rows, dy_rows, num_warps, OLDEST_FP8_CARD),
        ]
    return found
