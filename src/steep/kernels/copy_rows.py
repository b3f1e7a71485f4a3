"""Rows into columns of a wider buffer: torch's own copy of rows that are apart takes three times as long."""

# pyright: reportCallIssue=false, reportReturnType=false
# (a launch takes options; next_power_of_2 of a plain number is one)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from steep.kernels import variants
from steep.kernels.compilation import Compilation, triton_type

ELEMENTS = 4096  # of a program: 32 a thread
WARPS = 4


@cache
def configuration(columns: int) -> tuple[int, int]:
    """(ROWS_BLOCK, COLUMNS_BLOCK)."""
    block = min(triton.next_power_of_2(columns), ELEMENTS)
    return ELEMENTS // block, block


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
    row = tl.program_id(0).to(tl.int64) * ROWS_BLOCK + tl.arange(0, ROWS_BLOCK)[:, None]
    column = tl.program_id(1) * COLUMNS_BLOCK + tl.arange(0, COLUMNS_BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    value = tl.load(source + row * source_stride + column, mask=inside).to(tl.float32)
    tl.store(target + row * target_stride + column, value.to(target.dtype.element_ty), mask=inside)


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


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernel is launched for Llama-3-8B's hidden states and heads, and from a residual stream in fp32."""
    signature = {"source": triton_type(dtype), "target": triton_type(dtype)}
    signature |= dict.fromkeys(("rows", "columns", "source_stride", "target_stride"), "i32")
    found = []
    for source, columns in ((dtype, 4096), (dtype, 1024), (torch.float32, 4096)):
        rows_block, columns_block = configuration(columns)
        constants = {"ROWS_BLOCK": rows_block, "COLUMNS_BLOCK": columns_block}
        found.append(Compilation(copy_rows_kernel, {**signature, "source": triton_type(source)}, constants, WARPS))
    return found
