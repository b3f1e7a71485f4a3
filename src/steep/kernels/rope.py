"""Rotary position embedding of the q and k heads of a token, in place: a token a program, all its heads.

A gradient that is rotated back can be written in e4m3 too, for a product to read: then the program also reads what a
rotation leaves alone, the v heads and the end of a head.
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
from steep.kernels.fp8_rows import Rows, heads_sharing, store_heads


@cache
def configuration(num_heads: int, half: int) -> tuple[int, int, int]:
    """(HEADS_BLOCK, HALF_BLOCK, num_warps) to rotate `num_heads` heads by `half` angles: 32 pairs a thread."""
    heads_block, half_block = triton.next_power_of_2(num_heads), triton.next_power_of_2(half)
    return heads_block, half_block, min(max(heads_block * half_block // 1024, 1), 16)


@cache
def rest_block(rest: int) -> int:
    """REST_BLOCK for heads with `rest` elements that are not rotated."""
    return triton.next_power_of_2(max(rest, 1))


@triton.jit
def rope_kernel(
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


@triton.jit
def rope_backward_kernel(
    dqkv,
    cos,
    sin,
    codes,
    code_scale,
    factors,  # or None
    dqkv_stride,
    cos_stride,
    sin_stride,
    codes_stride,
    NUM_ROTATED: tl.constexpr,
    NUM_HEADS: tl.constexpr,  # of q, k and v together
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    SHARING: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    angle = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < NUM_HEADS) & (angle < HALF)
    is_rotated = head < NUM_ROTATED
    heads = dqkv + token * dqkv_stride + head * HEAD_DIM
    first = tl.load(heads + angle, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + HALF + angle, mask=inside, other=0.0).to(tl.float32)
    cosine = tl.load(cos + token * cos_stride + angle, mask=angle < HALF, other=0.0)
    sine = -tl.load(sin + token * sin_stride + angle, mask=angle < HALF, other=0.0)
    y1 = tl.where(is_rotated, first * cosine - second * sine, first)
    y2 = tl.where(is_rotated, second * cosine + first * sine, second)
    tl.store(heads + angle, y1.to(dqkv.dtype.element_ty), mask=inside & is_rotated)
    tl.store(heads + HALF + angle, y2.to(dqkv.dtype.element_ty), mask=inside & is_rotated)
    rest = None
    if HEAD_DIM > 2 * HALF:
        column = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        in_rest = (head < NUM_HEADS) & (column < HEAD_DIM)
        rest = tl.load(heads + column, mask=in_rest, other=0.0).to(tl.float32)
    scales = code_scale + token * (1 if SHARING == 0 else (NUM_HEADS * HEAD_DIM + 127) // 128)
    store_heads(
        y1, y2, rest, codes + token * codes_stride, scales, factors, NUM_HEADS, HEAD_DIM, HALF, HEADS_BLOCK, HALF_BLOCK,
        REST_BLOCK, SHARING,
    )  # fmt: skip


def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, head_dim: int, inverse: bool
) -> None:
    """Rotate the first `num_heads` heads of each row of `qkv` by the angles (`inverse`: by their negatives)."""
    half = cos.shape[1]
    heads_block, half_block, num_warps = configuration(num_heads, half)
    strides = qkv.stride(0), cos.stride(0), sin.stride(0)
    variants.launch(
        rope_kernel,
        (qkv.shape[0], 1, 1),
        (qkv, cos, sin),
        (*strides, num_heads, head_dim, half, inverse, heads_block, half_block),
        num_warps=num_warps,
    )


def rotate_back(
    dqkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_rotated: int, head_dim: int, rows: Rows
) -> None:
    """Rotate the first `num_rotated` heads of each row of `dqkv` back, and write all its heads in e4m3 into `rows`."""
    half, num_heads = cos.shape[1], dqkv.shape[1] // head_dim
    heads_block, half_block, num_warps = configuration(num_heads, half)
    codes_stride, sharing = heads_sharing(rows, head_dim, heads_block)
    strides = dqkv.stride(0), cos.stride(0), sin.stride(0), codes_stride
    blocks = heads_block, half_block, rest_block(head_dim - 2 * half)
    variants.launch(
        rope_backward_kernel,
        (dqkv.shape[0], 1, 1),
        (dqkv, cos, sin, *rows),
        (*strides, num_rotated, num_heads, head_dim, half, *blocks, sharing),
        num_warps=num_warps,
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernels are launched for q and k in `dtype`: Llama-3-8B's heads, and Gemma's wide ones backwards; with
    e4m3, pieces of two of Llama-3-1B's heads too."""
    signature = {"qkv": triton_type(dtype), "cos": "*fp32", "sin": "*fp32"}
    signature |= dict.fromkeys(("qkv_stride", "cos_stride", "sin_stride"), "i32")
    found = []
    for num_heads, head_dim, inverse in ((40, 128, False), (12, 256, True)):
        heads_block, half_block, num_warps = configuration(num_heads, head_dim // 2)
        constants = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "HALF": head_dim // 2, "INVERSE": inverse}
        constants |= {"HEADS_BLOCK": heads_block, "HALF_BLOCK": half_block}
        found.append(Compilation(rope_kernel, signature, constants, num_warps))
    signature |= {"dqkv": triton_type(dtype), "dqkv_stride": "i32", "codes_stride": "i32"}
    signature |= {"codes": "*fp8e4nv", "code_scale": "*fp32", "factors": "*fp32"}
    for num_rotated, num_heads, head_dim, sharing in ((40, 48, 128, 0), (40, 48, 64, 2)):
        heads_block, half_block, num_warps = configuration(num_heads, head_dim // 2)
        constants = {"NUM_ROTATED": num_rotated, "NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "HALF": head_dim // 2}
        constants |= {"HEADS_BLOCK": heads_block, "HALF_BLOCK": half_block, "REST_BLOCK": 1, "SHARING": sharing}
        constants |= {"factors": None} if sharing else {}
        found.append(Compilation(rope_backward_kernel, signature, constants, num_warps, OLDEST_FP8_CARD))
    return found
