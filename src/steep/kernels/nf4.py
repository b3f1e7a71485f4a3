"""NF4 to a matrix in one pass: half a byte and a share of an absmax read, one rounded value written.

A thread takes some of the eight words of a block of 64, each a word of eight codes: it reads 4 bytes and writes 16 (in
16 bit) beside its neighbour's, and has the absmax and the place in the matrix once for all of them. The table's 16
values stay in the first-level cache.

Weights that stand one below the other are written by one launch; a program stays within one of them.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch takes options, and constants as plain numbers; static_range unrolls)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from steep.kernels.compilation import Compilation, triton_type
from steep.kernels.variants import Grid, Prepared

UNIT = 64  # codes that have one absmax and stand in one row, whatever the block size from 64 on
PARTS = 2  # words of a unit a thread takes: 1, 2 or 4
NUM_WARPS = 4


@triton.jit
def absmax_of(block, inside, absmax, code_book, nested_absmax, offset, NESTED_BLOCK_SIZE: tl.constexpr):
    """The fp32 absmax of blocks. `code_book` is None where it is stored in fp32."""
    stored = tl.load(absmax + block, mask=inside, other=0)
    if code_book is not None:
        nested = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=inside, other=0.0)
        stored = tl.load(code_book + stored.to(tl.int32)) * nested + tl.load(offset)
    return stored


@triton.jit(do_not_specialize=["out_stride", "units_a_row"])
def nf4_write_kernel(
    out,
    weights,
    units,  # of each weight
    out_stride,  # in units of 8 elements where ALIGNED
    units_a_row,
    ALIGNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    THREADS: tl.constexpr,
):
    APART: tl.constexpr = 8 // PARTS
    UNITS: tl.constexpr = THREADS // APART  # of a program, all of one weight
    program = tl.program_id(0)
    weight, num_units = weights[0], units[0]
    first, before = 0, 0  # program and unit where the weight begins
    next_first, next_before = 0, 0
    for i in tl.static_range(1, len(weights)):
        next_first += tl.cdiv(units[i - 1], UNITS)
        next_before += units[i - 1]
        if program >= next_first:
            weight, num_units, first, before = weights[i], units[i], next_first, next_before
    words, table, absmax = weight[0], weight[1], weight[2]
    code_book, nested_absmax, offset = None, None, None
    if len(weight) > 3:
        code_book, nested_absmax, offset = weight[3], weight[4], weight[5]
    if ALIGNED:
        out_stride = out_stride * 8

    thread = tl.arange(0, THREADS)
    unit, word = (program - first) * UNITS + thread // APART, thread % APART
    inside = unit < num_units
    block = unit // (BLOCK_SIZE // 64)
    scale = absmax_of(block, inside, absmax, code_book, nested_absmax, offset, NESTED_BLOCK_SIZE)
    in_all = before + unit
    row = in_all // units_a_row
    start = row.to(tl.int64) * out_stride + (in_all - row * units_a_row) * 64 + word * 8
    place = tl.arange(0, 8)
    shift = (place ^ 1) * 4  # a byte's high half comes first
    for part in tl.static_range(PARTS):
        packed = tl.load(words + unit * 8 + word + part * APART, mask=inside, other=0).to(tl.uint32, bitcast=True)
        code = (packed[:, None] >> shift[None, :]) & 15
        value = tl.load(table + code) * scale[:, None]
        out_at = out + start[:, None] + (part * APART * 8 + place)[None, :]
        tl.store(out_at, value.to(out.dtype.element_ty), mask=inside[:, None])


# words (int32, flat), table and absmax of a weight; code book, nested absmax and offset where that is quantised again
Stored = tuple[torch.Tensor, ...]


def write(
    weights: tuple[Stored, ...],
    rows: Sequence[int],
    block_size: int,
    nested_block_size: int,
    out: torch.Tensor,
    prepared: Prepared,
) -> None:
    """out [out_features of all, in_features] = weights, one below the other. in_features and the block
    size are multiples of UNIT. All have an absmax that is quantised again, or none.

    Args:
        rows: out_features of each.
        prepared: launches that differ in `out` alone.
    """

    def arguments() -> tuple[Grid, tuple[Any, ...]]:
        units_a_row, out_stride = out.shape[1] // UNIT, out.stride(0)
        units = tuple(height * units_a_row for height in rows)
        a_program = 32 * NUM_WARPS * PARTS // 8
        aligned = out_stride % 8 == 0
        grid = sum(-(-of_weight // a_program) for of_weight in units), 1, 1
        numbers = out_stride // 8 if aligned else out_stride, units_a_row
        return grid, (weights, units, *numbers, aligned, block_size, nested_block_size, PARTS, 32 * NUM_WARPS)

    # The absmax is a product, rounded, and a sum, rounded, as bitsandbytes has it.
    prepared.launch(nf4_write_kernel, out, arguments, num_warps=NUM_WARPS, enable_fp_fusion=False)


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernel is launched to write up to three weights in `dtype`: their absmax quantised again, or in fp32."""
    constants = {"BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256, "PARTS": PARTS, "THREADS": 32 * NUM_WARPS}
    numbers = {"out_stride": "i32", "units_a_row": "i32"}
    nested, plain = ("*i32", "*fp32", "*u8", "*fp32", "*fp32", "*fp32"), ("*i32", "*fp32", "*fp32")
    return [
        Compilation(
            nf4_write_kernel,
            {"weights": (stored,) * number, "units": ("i32",) * number, "out": triton_type(dtype)} | numbers,
            constants | {"ALIGNED": aligned},
            NUM_WARPS,
        )
        for number, stored, aligned in ((1, nested, True), (2, nested, True), (3, nested, True), (3, plain, False))
    ]
