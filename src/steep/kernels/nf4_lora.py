"""NF4 + B·A with one rounding: the weight that a linear layer with LoRA has, a tile a program.

The product is summed up in fp32 first, then the tile's weights are looked up, added in fp32, and the sum is rounded.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch takes options, and constants as plain numbers)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steep.kernels.compilation import Compilation, triton_type
from steep.kernels.nf4 import absmax_of

ROWS, COLUMNS = 64, 128  # of a tile
GROUP = 8  # tiles of rows that go over the columns together, so that their pieces of B and A stay in the cache
NUM_WARPS = 4
NUM_STAGES = 3


def rank_step(dtype: torch.dtype) -> int:
    """How much of the rank a step of the product takes: as many bytes in fp32 as in 16 bit."""
    return 128 // dtype.itemsize


@triton.jit
def merge_kernel(
    words,
    absmax,
    code_book,  # with nested_absmax and offset, or all None
    nested_absmax,
    offset,
    table,
    b,
    a,
    out,
    num_rows,
    words_a_row,
    rank,
    b_stride,
    a_stride,
    out_stride,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK_STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_columns = words_a_row * 8
    row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    group = tl.program_id(0) // (GROUP * column_tiles)
    in_group = tl.program_id(0) % (GROUP * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    row = (group * GROUP + in_group % group_rows) * ROWS + tl.arange(0, ROWS)
    first_column = in_group // group_rows * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    is_row, is_column = row < num_rows, column < num_columns
    far_row = row.to(tl.int64)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANK_STEP):
        part = start + tl.arange(0, RANK_STEP)
        is_part = part < rank
        b_at = b + far_row[:, None] * b_stride + part[None, :]
        a_at = a + part.to(tl.int64)[:, None] * a_stride + column[None, :]
        left = tl.load(b_at, mask=is_row[:, None] & is_part[None, :], other=0.0)
        right = tl.load(a_at, mask=is_part[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")

    column_word = first_column // 8 + tl.arange(0, COLUMNS // 8)
    word = row[:, None] * words_a_row + column_word[None, :]
    inside = is_row[:, None] & (column_word < words_a_row)[None, :]
    packed = tl.load(words + word, mask=inside, other=0).to(tl.uint32, bitcast=True)
    block = word // (BLOCK_SIZE // 8)
    scale = absmax_of(block, inside, absmax, code_book, nested_absmax, offset, NESTED_BLOCK_SIZE)
    shift = (tl.arange(0, 8) ^ 1) * 4  # a byte's high half comes first
    code = (packed[:, :, None] >> shift[None, None, :]) & 15
    total += tl.reshape(tl.load(table + code) * scale[:, :, None], (ROWS, COLUMNS))

    out_at = out + far_row[:, None] * out_stride + column[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def merge(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    code_book: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    table: torch.Tensor,
    block_size: int,
    nested_block_size: int,
    b: torch.Tensor,
    a: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out [out_features, in_features] = the weight + b [out_features, r] @ a [r, in_features]. in_features is a
    multiple of 8, `codes` is flat and aligned to 4 bytes; rows of b, a and out may be apart."""
    num_rows, num_columns = out.shape
    merge_kernel[(triton.cdiv(num_rows, ROWS) * triton.cdiv(num_columns, COLUMNS),)](
        codes.view(torch.int32),
        absmax,
        code_book,
        nested_absmax,
        offset,
        table,
        b,
        a,
        out,
        num_rows,
        num_columns // 8,
        b.shape[1],
        b.stride(0),
        a.stride(0),
        out.stride(0),
        BLOCK_SIZE=block_size,
        NESTED_BLOCK_SIZE=nested_block_size,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        RANK_STEP=rank_step(b.dtype),
        GROUP=GROUP,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        enable_fp_fusion=False,  # the absmax as in kernels/nf4.py
    )


def runs_on(device: torch.device) -> bool:
    """Triton's dot has tensor cores from compute capability 8.0 on. Before, the tile does not fit in registers."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernel is launched for an adapter and a weight in `dtype`, the absmax quantised again. Cards that know
    fp16 only are not run on."""
    if dtype == torch.float16:
        return []
    pointers = {"words": "*i32", "absmax": "*u8", "code_book": "*fp32", "nested_absmax": "*fp32", "offset": "*fp32"}
    pointers |= {"table": "*fp32", "b": triton_type(dtype), "a": triton_type(dtype), "out": triton_type(dtype)}
    integers = ("num_rows", "words_a_row", "rank", "b_stride", "a_stride", "out_stride")
    constants = {"BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256, "ROWS": ROWS, "COLUMNS": COLUMNS}
    constants |= {"RANK_STEP": rank_step(dtype), "GROUP": GROUP}
    signature = pointers | dict.fromkeys(integers, "i32")
    return [Compilation(merge_kernel, signature, constants, NUM_WARPS, NUM_STAGES)]
