"""Rows in e4m3, for the kernels that compute them: each writes its codes and scales beside its result.

What is written stands in `steep.ops.fp8`. The largest magnitude is sought among the bits of the numbers: as integers
they are in the order of the magnitudes, and what is infinite or undefined is above all others, where a maximum of
numbers passes over the undefined. It makes the scale, so that the whole row or piece is undefined then.
"""

# pyright: reportCallIssue=false, reportReturnType=false
# (calls of kernels' parts are not typed; next_power_of_2 of a plain number is one)

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import torch
import triton
import triton.language as tl

SMALLEST = tl.constexpr(2.0**-100)
PIECE = tl.constexpr(128)

Rows: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # codes, scale, factors
NO_ROWS = (None, None, None)
MAX_COLUMNS = 16384


@cache  # next_power_of_2 takes 1.5 us of the host, a third of an empty launch
def whole_row(columns: int) -> tuple[int, int]:
    """(BLOCK, num_warps) for rows of which a program has all in registers: 16 elements a thread, so two 16-byte reads
    of bf16."""
    assert columns <= MAX_COLUMNS, f"a row of {columns} does not fit in registers"
    block = triton.next_power_of_2(columns)
    return block, min(max(block // 512, 1), 32)


def sharing(rows: Rows | None, block: int) -> tuple[int, int]:
    """The codes' stride, and how many columns of a block of a row share a scale."""
    if rows is None:
        return 0, 0
    codes, scale, _ = rows
    return codes.stride(0), min(128, block) if scale.dim() == 2 else block


def heads_sharing(rows: Rows | None, head_dim: int, heads_block: int) -> tuple[int, int]:
    """The codes' stride, and how many heads share a piece, 0 where the row has one scale."""
    if rows is None:
        return 0, 0
    codes, scale, _ = rows
    return codes.stride(0), min(max(128 // head_dim, 1), heads_block) if scale.dim() == 2 else 0


@triton.jit
def weighted(values, factors, column, inside):
    """The values times the factors of their columns, and 0 where there is no column."""
    if factors is not None:
        # The same for every row: they stay in the first-level cache.
        values *= tl.load(factors + column, mask=inside, other=0.0, eviction_policy="evict_last")
    return tl.where(inside, values, 0.0)


@triton.jit
def magnitude(values):
    """Bits of their magnitudes, int32."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_of(bits):
    """The number that has these bits, at least SMALLEST."""
    largest = bits.to(tl.float32, bitcast=True)
    return tl.where(largest < SMALLEST, SMALLEST, largest)


@triton.jit
def inverse_of(largest):
    """What its row or piece is multiplied by, rounded as torch rounds it: values in bf16 often stand just between two
    codes, and the next number would take them to the other."""
    return tl.div_rn(1.0, largest) * 448.0


@triton.jit
def store_columns(
    values,
    first,
    end,
    codes,
    scales,
    factors,  # or None
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Write values [BLOCK] in fp32, the columns of a row from `first` on and before `end`, of which each SHARED have a
    scale: a divisor of `first`. `codes` and `scales` are where the row begins."""
    offset = tl.arange(0, BLOCK)
    inside = first + offset < end
    pieces = tl.reshape(weighted(values, factors, first + offset, inside), (BLOCK // SHARED, SHARED))
    largest = largest_of(tl.max(magnitude(pieces), axis=1))
    piece = tl.arange(0, BLOCK // SHARED)
    tl.store(scales + first // SHARED + piece, largest / 448.0, mask=first + piece * SHARED < end)
    scaled = tl.reshape(pieces * inverse_of(largest)[:, None], (BLOCK,))
    tl.store(codes + first + offset, scaled.to(tl.float8e4nv), mask=inside)


@triton.jit
def store_heads(
    first,
    second,
    rest,  # or None
    codes,
    scales,
    factors,  # or None
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    SHARING: tl.constexpr,
):
    """Write a row of heads, in fp32: their first HALF columns, the second, and what is left. `codes` and `scales` are
    where the row begins. SHARING heads have a piece together, or a head has several; with 0 the row has one scale."""
    HAS_REST: tl.constexpr = HEAD_DIM > 2 * HALF
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    angle = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < NUM_HEADS) & (angle < HALF)
    column = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
    in_rest = (head < NUM_HEADS) & (column < HEAD_DIM)
    first = weighted(first, factors, head * HEAD_DIM + angle, inside)
    second = weighted(second, factors, head * HEAD_DIM + HALF + angle, inside)
    if HAS_REST:
        rest = weighted(rest, factors, head * HEAD_DIM + column, in_rest)

    if SHARING == 0:
        bits = tl.max(tl.maximum(magnitude(first), magnitude(second)))
        if HAS_REST:
            bits = tl.maximum(bits, tl.max(magnitude(rest)))
        largest = largest_of(bits)
        tl.store(scales, largest / 448.0)
        inverse = inverse_of(largest)
        first *= inverse
        second *= inverse
        if HAS_REST:
            rest *= inverse
    else:
        NUM_PIECES: tl.constexpr = (NUM_HEADS * HEAD_DIM + PIECE - 1) // PIECE
        OF_A_HEAD: tl.constexpr = (HEAD_DIM + PIECE - 1) // PIECE
        GROUPS: tl.constexpr = HEADS_BLOCK // SHARING
        for part in tl.static_range(OF_A_HEAD):
            in_first = angle // PIECE == part
            in_second = (HALF + angle) // PIECE == part
            bits = tl.where(in_first, magnitude(first), 0)
            bits = tl.max(tl.maximum(bits, tl.where(in_second, magnitude(second), 0)), axis=1)
            if HAS_REST:
                of_part = column // PIECE == part
                bits = tl.maximum(bits, tl.max(tl.where(of_part, magnitude(rest), 0), axis=1))
            if SHARING > 1:
                bits = tl.max(tl.reshape(bits, (GROUPS, SHARING)), axis=1)
            largest = largest_of(bits)
            piece = tl.arange(0, GROUPS) * OF_A_HEAD + part
            tl.store(scales + piece, largest / 448.0, mask=piece < NUM_PIECES)
            inverse = inverse_of(largest)
            if SHARING > 1:  # to a vector: as [heads, 1] a thread would hold whole heads, and spill
                inverse = tl.reshape(tl.broadcast_to(inverse[:, None], (GROUPS, SHARING)), (HEADS_BLOCK,))
            first *= tl.where(in_first, inverse[:, None], 1.0)
            second *= tl.where(in_second, inverse[:, None], 1.0)
            if HAS_REST:
                rest *= tl.where(of_part, inverse[:, None], 1.0)

    place = codes + head * HEAD_DIM
    tl.store(place + angle, first.to(tl.float8e4nv), mask=inside)
    tl.store(place + HALF + angle, second.to(tl.float8e4nv), mask=inside)
    if HAS_REST:
        tl.store(place + column, rest.to(tl.float8e4nv), mask=in_rest)
