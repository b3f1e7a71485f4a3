"""Rows into columns of a wider buffer: torch's own copy of rows that are apart takes three times as long."""

# pyright: reportCallIssue=false, reportReturnType=false
# (a launch takes options; next_power_of_2 of a plain number is one)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from steep.kernels import OLDEST_FP8_CARD, variants
from steep.kernels.compilation import Compilation, triton_type
from steep.kernels.fp8_rows import MAX_COLUMNS, Rows, sharing, store_columns, whole_row

ELEMENTS = 4096  # of a program: 32 a thread
WARPS = 4


@cache
def configuration(columns: int) -> tuple[int, int]:
    """(ROWS_BLOCK, COLUMNS_BLOCK)."""
    block = min(triton.next_power_of_2(columns), ELEMENTS)
    return ELEMENTS // block, block


@triton.jit
def copy_tile(
    source,
    target,
    source_stride,
    target_stride,
    row_tile,
    column_tile,
    rows,
    columns,
    ROWS_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr,
):
    row = row_tile.to(tl.int64) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)[:, None]
    column = column_tile * COLUMNS_BLOCK + tl.arange(0, COLUMNS_BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(source + row * source_stride + column, mask=inside).to(tl.float32)
    tl.store(target + row * target_stride + column, value.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def copy_rows_kernel(
    source,
    target,
    rows,
    columns,
    source_stride,
    target_stride,
    ROWS_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0), tl.program_id(1)
    copy_tile(source, target, source_stride, target_stride, row, column, rows, columns, ROWS_BLOCK, COLUMNS_BLOCK)


@triton.jit
def copy_quantised_kernel(
    source,
    target,
    codes,
    code_scale,
    factors,  # or None
    source_stride,
    target_stride,
    codes_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    value = tl.load(source + row * source_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + row * target_stride + column, value.to(target.dtype.element_ty), mask=inside)
    scales = code_scale + row * ((COLUMNS + SHARED - 1) // SHARED)
    store_columns(value, 0, COLUMNS, codes + row * codes_stride, scales, factors, BLOCK, SHARED)


@triton.jit(do_not_specialize=["rows"])
def join_rows_kernel(
    first,
    second,
    third,
    target,
    rows,
    columns,  # of the first
    other_columns,  # of each of the others
    first_stride,
    second_stride,
    third_stride,
    target_stride,
    ROWS_BLOCK: tl.constexpr,
    COLUMNS_BLOCK: tl.constexpr,
):
    tiles, other_tiles = tl.cdiv(columns, COLUMNS_BLOCK), tl.cdiv(other_columns, COLUMNS_BLOCK)
    row, column = tl.program_id(0), tl.program_id(1)
    if column < tiles:
        copy_tile(first, target, first_stride, target_stride, row, column, rows, columns, ROWS_BLOCK, COLUMNS_BLOCK)
    elif column < tiles + other_tiles:
        place = target + columns
        column -= tiles
        copy_tile(
            second, place, second_stride, target_stride, row, column, rows, other_columns, ROWS_BLOCK, COLUMNS_BLOCK
        )
    else:
        place = target + columns + other_columns
        column -= tiles + other_tiles
        copy_tile(
            third, place, third_stride, target_stride, row, column, rows, other_columns, ROWS_BLOCK, COLUMNS_BLOCK
        )


def copy_rows(source: torch.Tensor, target: torch.Tensor) -> None:
    """target = source, both [rows, columns] with rows apart, each in its own dtype."""
    rows, columns = source.shape
    rows_block, columns_block = configuration(columns)
    variants.launch(
        copy_rows_kernel,
        (-(-rows // rows_block), -(-columns // columns_block), 1),
        (source, target),
        (columns, source.stride(0), target.stride(0), rows_block, columns_block),
        free=(rows,),
        num_warps=WARPS,
    )


def copy_quantised(source: torch.Tensor, target: torch.Tensor, rows: Rows) -> None:
    """target = source, both [T, n] with rows apart; and in e4m3 into `rows`. A row a program."""
    num_rows, columns = source.shape
    block, num_warps = whole_row(columns)
    codes_stride, shared = sharing(rows, block)
    variants.launch(
        copy_quantised_kernel,
        (num_rows, 1, 1),
        (source, target, *rows),
        (source.stride(0), target.stride(0), codes_stride, columns, block, shared),
        num_warps=num_warps,
    )


def join_rows(first: torch.Tensor, second: torch.Tensor, third: torch.Tensor, target: torch.Tensor) -> None:
    """target [rows, n + 2 m] = first [rows, n], second and third [rows, m] side by side, all with rows apart."""
    (rows, columns), other_columns = first.shape, second.shape[1]
    rows_block, columns_block = configuration(other_columns)
    tiles = -(-columns // columns_block) + 2 * -(-other_columns // columns_block)
    strides = first.stride(0), second.stride(0), third.stride(0), target.stride(0)
    variants.launch(
        join_rows_kernel,
        (-(-rows // rows_block), tiles, 1),
        (first, second, third, target),
        (columns, other_columns, *strides, rows_block, columns_block),
        free=(rows,),
        num_warps=WARPS,
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernels are launched for Llama-3-8B's hidden states and heads, and from a residual stream in fp32; with
    e4m3, the longest rows too."""
    signature = {"source": triton_type(dtype), "target": triton_type(dtype)}
    signature |= dict.fromkeys(("rows", "columns", "source_stride", "target_stride"), "i32")
    found = []
    for source, columns in ((dtype, 4096), (dtype, 1024), (torch.float32, 4096)):
        rows_block, columns_block = configuration(columns)
        constants = {"ROWS_BLOCK": rows_block, "COLUMNS_BLOCK": columns_block}
        found.append(Compilation(copy_rows_kernel, {**signature, "source": triton_type(source)}, constants, WARPS))
    rows = {name: triton_type(dtype) for name in ("source", "target")}
    rows |= {"codes": "*fp8e4nv", "code_scale": "*fp32", "factors": "*fp32"}
    rows |= dict.fromkeys(("source_stride", "target_stride", "codes_stride"), "i32")
    for columns, pieces in ((4096, False), (MAX_COLUMNS, True)):
        block, num_warps = whole_row(columns)
        constants = {"COLUMNS": columns, "BLOCK": block, "SHARED": 128 if pieces else block}
        found.append(Compilation(copy_quantised_kernel, rows, constants, num_warps, OLDEST_FP8_CARD))
    numbers = ("rows", "columns", "other_columns", "first_stride", "second_stride", "third_stride", "target_stride")
    signature = {name: triton_type(dtype) for name in ("first", "second", "third", "target")}
    signature |= dict.fromkeys(numbers, "i32")
    rows_block, columns_block = configuration(1024)
    constants = {"ROWS_BLOCK": rows_block, "COLUMNS_BLOCK": columns_block}
    return [*found, Compilation(join_rows_kernel, signature, constants, WARPS)]
