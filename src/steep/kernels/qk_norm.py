"""RMS norm of every q and k head, then rotary position embedding: a token a program, all heads, one pass each way.

A head is handled as what is rotated against each other, its first R/2 and next R/2 elements, and what is left (REST).
Backward can write its result in e4m3 too, for a product to read: then it also reads the v heads, which it leaves alone.
"""

# pyright: reportCallIssue=false, reportReturnType=false
# (a launch takes options; next_power_of_2 of a plain number is one)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from steep.kernels import OLDEST_FP8_CARD, variants
from steep.kernels.compilation import Compilation, triton_type
from steep.kernels.fp8_rows import NO_ROWS, Rows, heads_sharing, store_heads
from steep.kernels.rope import rest_block


@cache
def configuration(num_heads: int, half: int) -> tuple[int, int, int]:
    """(HEADS_BLOCK, HALF_BLOCK, num_warps) for `num_heads` heads of `half` angles: 16 pairs a thread."""
    heads_block, half_block = triton.next_power_of_2(num_heads), triton.next_power_of_2(half)
    return heads_block, half_block, min(max(heads_block * half_block // 512, 1), 16)


@triton.jit
def load_scale(q_weight, k_weight, is_q, column, inside, UNIT_OFFSET: tl.constexpr):
    """[heads, columns]: each head's norm weight."""
    q_scale = tl.load(q_weight + column, mask=inside, other=0.0).to(tl.float32)
    k_scale = tl.load(k_weight + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.where(is_q, q_scale, k_scale)
    if UNIT_OFFSET:
        scale += 1.0
    return scale


@triton.jit
def qk_norm_kernel(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    out,
    qkv_stride,
    cos_stride,
    sin_stride,
    out_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    angle = tl.arange(0, HALF_BLOCK)[None, :]
    has_angle = angle < HALF
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & has_angle
    is_q = head < NUM_HEADS
    is_v = head >= NUM_HEADS + NUM_KV_HEADS
    source = qkv + token * qkv_stride + head * HEAD_DIM
    target = out + token * out_stride + head * HEAD_DIM

    first = tl.load(source + angle, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + angle, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(cos + token * cos_stride + angle, mask=has_angle, other=0.0)
    sine = tl.load(sin + token * sin_stride + angle, mask=has_angle, other=0.0)
    squares = tl.sum(first * first + second * second, axis=1)[:, None]
    if REST > 0:
        column = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        in_rest = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (column < HEAD_DIM)
        rest = tl.load(source + column, mask=in_rest, other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, axis=1)[:, None]
    rstd = tl.rsqrt(squares / HEAD_DIM + eps)

    n1 = first * rstd * load_scale(q_weight, k_weight, is_q, angle, has_angle, UNIT_OFFSET)
    n2 = second * rstd * load_scale(q_weight, k_weight, is_q, HALF + angle, has_angle, UNIT_OFFSET)
    y1 = tl.where(is_v, first, n1 * cosine - n2 * sine)
    y2 = tl.where(is_v, second, n2 * cosine + n1 * sine)
    tl.store(target + angle, y1.to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF + angle, y2.to(out.dtype.element_ty), mask=inside)
    if REST > 0:
        scale = load_scale(q_weight, k_weight, is_q, column, column < HEAD_DIM, UNIT_OFFSET)
        tl.store(target + column, tl.where(is_v, rest, rest * rstd * scale).to(out.dtype.element_ty), mask=in_rest)


@triton.jit
def qk_norm_backward_kernel(
    dqkv,
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    codes,  # or None
    code_scale,  # or None
    factors,  # or None
    dqkv_stride,
    qkv_stride,
    cos_stride,
    sin_stride,
    codes_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    SHARING: tl.constexpr,
):
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    angle = tl.arange(0, HALF_BLOCK)[None, :]
    has_angle = angle < HALF
    inside = (head < NUM_HEADS + NUM_KV_HEADS) & has_angle
    is_q = head < NUM_HEADS
    source = qkv + token * qkv_stride + head * HEAD_DIM
    gradient = dqkv + token * dqkv_stride + head * HEAD_DIM

    x1 = tl.load(source + angle, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF + angle, mask=inside, other=0.0).to(tl.float32)
    dy1 = tl.load(gradient + angle, mask=inside, other=0.0).to(tl.float32)
    dy2 = tl.load(gradient + HALF + angle, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(cos + token * cos_stride + angle, mask=has_angle, other=0.0)
    sine = tl.load(sin + token * sin_stride + angle, mask=has_angle, other=0.0)
    g1 = (dy1 * cosine + dy2 * sine) * load_scale(q_weight, k_weight, is_q, angle, has_angle, UNIT_OFFSET)
    g2 = (dy2 * cosine - dy1 * sine) * load_scale(q_weight, k_weight, is_q, HALF + angle, has_angle, UNIT_OFFSET)
    squares = tl.sum(x1 * x1 + x2 * x2, axis=1)[:, None]
    along = tl.sum(g1 * x1 + g2 * x2, axis=1)[:, None]
    if REST > 0:
        column = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        in_rest = (head < NUM_HEADS + NUM_KV_HEADS) & (column < HEAD_DIM)
        x3 = tl.load(source + column, mask=in_rest, other=0.0).to(tl.float32)
        g3 = tl.load(gradient + column, mask=in_rest, other=0.0).to(tl.float32)
        g3 *= load_scale(q_weight, k_weight, is_q, column, column < HEAD_DIM, UNIT_OFFSET)
        squares += tl.sum(x3 * x3, axis=1)[:, None]
        along += tl.sum(g3 * x3, axis=1)[:, None]
    rstd = tl.rsqrt(squares / HEAD_DIM + eps)
    along = along / HEAD_DIM * rstd * rstd

    dx1, dx2, dx3 = (g1 - x1 * along) * rstd, (g2 - x2 * along) * rstd, None
    tl.store(gradient + angle, dx1.to(dqkv.dtype.element_ty), mask=inside)
    tl.store(gradient + HALF + angle, dx2.to(dqkv.dtype.element_ty), mask=inside)
    if REST > 0:
        dx3 = (g3 - x3 * along) * rstd
        tl.store(gradient + column, dx3.to(dqkv.dtype.element_ty), mask=in_rest)

    if codes is not None:
        ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
        is_v = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < ALL_HEADS)
        dx1 = tl.where(is_v, tl.load(gradient + angle, mask=is_v & has_angle, other=0.0).to(tl.float32), dx1)
        dx2 = tl.where(is_v, tl.load(gradient + HALF + angle, mask=is_v & has_angle, other=0.0).to(tl.float32), dx2)
        if REST > 0:
            v_rest = tl.load(gradient + column, mask=is_v & (column < HEAD_DIM), other=0.0).to(tl.float32)
            dx3 = tl.where(is_v, v_rest, dx3)
        scales = code_scale + token * (1 if SHARING == 0 else (ALL_HEADS * HEAD_DIM + 127) // 128)
        store_heads(
            dx1, dx2, dx3, codes + token * codes_stride, scales, factors, ALL_HEADS, HEAD_DIM, HALF, HEADS_BLOCK,
            HALF_BLOCK, REST_BLOCK, SHARING,
        )  # fmt: skip


def forward(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    unit_offset: bool,
    out: torch.Tensor,
) -> None:
    """out = q and k heads of qkv normed and rotated, v heads copied."""
    half = cos.shape[1]
    heads_block, half_block, num_warps = configuration(num_heads + 2 * num_kv_heads, half)
    strides = qkv.stride(0), cos.stride(0), sin.stride(0), out.stride(0)
    heads = num_heads, num_kv_heads, head_dim
    variants.launch(
        qk_norm_kernel,
        (qkv.shape[0], 1, 1),
        (qkv, q_weight, k_weight, cos, sin, out),
        (*strides, eps, *heads, half, unit_offset, heads_block, half_block, rest_block(head_dim - 2 * half)),
        num_warps=num_warps,
    )


def backward(
    dqkv: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    unit_offset: bool,
    rows: Rows | None,
) -> None:
    """In place: the q and k heads of dqkv become the gradients by those of the raw qkv; all heads go in e4m3 into
    `rows`."""
    half = cos.shape[1]
    handled = num_heads + (num_kv_heads if rows is None else 2 * num_kv_heads)
    heads_block, half_block, num_warps = configuration(handled, half)
    codes_stride, sharing = heads_sharing(rows, head_dim, heads_block)
    strides = dqkv.stride(0), qkv.stride(0), cos.stride(0), sin.stride(0), codes_stride
    heads = num_heads, num_kv_heads, head_dim
    blocks = heads_block, half_block, rest_block(head_dim - 2 * half)
    variants.launch(
        qk_norm_backward_kernel,
        (qkv.shape[0], 1, 1),
        (dqkv, qkv, q_weight, k_weight, cos, sin, *(rows or NO_ROWS)),
        (*strides, eps, *heads, half, unit_offset, *blocks, sharing),
        num_warps=num_warps,
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernels are launched for q and k in `dtype`: Qwen3-8B's heads, and Gemma-3-4B's; with e4m3, the latter in
    pieces."""
    kind = triton_type(dtype)
    signature = {"qkv": kind, "dqkv": kind, "out": kind, "q_weight": kind, "k_weight": kind}
    signature |= {"cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
    strides = ("qkv_stride", "dqkv_stride", "out_stride", "cos_stride", "sin_stride", "codes_stride")
    signature |= dict.fromkeys(strides, "i32")
    found = []
    for num_heads, num_kv_heads, head_dim, unit_offset in ((32, 8, 128, False), (8, 4, 256, True)):
        constants = {"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim}
        constants |= {"HALF": head_dim // 2, "UNIT_OFFSET": unit_offset, "REST_BLOCK": 1}
        for kernel, handled in (
            (qk_norm_kernel, num_heads + 2 * num_kv_heads),
            (qk_norm_backward_kernel, num_heads + num_kv_heads),
        ):
            heads_block, half_block, num_warps = configuration(handled, head_dim // 2)
            blocks: dict[str, object] = {"HEADS_BLOCK": heads_block, "HALF_BLOCK": half_block}
            if kernel is qk_norm_backward_kernel:
                blocks |= {"SHARING": 0, "codes": None, "code_scale": None, "factors": None}
            found.append(Compilation(kernel, signature, constants | blocks, num_warps))
        heads_block, half_block, num_warps = configuration(num_heads + 2 * num_kv_heads, head_dim // 2)
        blocks = {"HEADS_BLOCK": heads_block, "HALF_BLOCK": half_block, "SHARING": int(head_dim > 128)}
        rows = signature | {"codes": "*fp8e4nv", "code_scale": "*fp32", "factors": "*fp32"}
        found.append(Compilation(qk_norm_backward_kernel, rows, constants | blocks, num_warps, OLDEST_FP8_CARD))
    return found
