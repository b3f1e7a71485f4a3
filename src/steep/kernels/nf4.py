"""NF4 to a matrix in one pass: half a byte and a share of an absmax read, one rounded value written.

A thread takes some of the eight words of a block of 64, each a word of eight codes: it reads 4 bytes and writes 16 (in
16 bit) beside its neighbour's, and has the absmax and the place in the matrix once for all of them. The table's 16
values stay in the first-level cache.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch takes options, and constants as plain numbers; static_range unrolls)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steep.kernels.compilation import Compilation, triton_type

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


@triton.jit
def write_kernel(
    words,
    absmax,
    code_book,  # with nested_absmax and offset, or all None
    nested_absmax,
    offset,
    table,
    out,
    num_units,
    units_a_row,
    out_stride,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    THREADS: tl.constexpr,
):
    APART: tl.constexpr = 8 // PARTS
    thread = tl.program_id(0) * THREADS + tl.arange(0, THREADS)
    unit, word = thread // APART, thread % APART
    inside = unit < num_units
    block = unit // (BLOCK_SIZE // 64)
    scale = absmax_of(block, inside, absmax, code_book, nested_absmax, offset, NESTED_BLOCK_SIZE)
    row = unit // units_a_row
    start = row.to(tl.int64) * out_stride + (unit - row * units_a_row) * 64 + word * 8
    place = tl.arange(0, 8)
    shift = (place ^ 1) * 4  # a byte's high half comes first
    for part in tl.static_range(PARTS):
        packed = tl.load(words + unit * 8 + word + part * APART, mask=inside, other=0).to(tl.uint32, bitcast=True)
        code = (packed[:, None] >> shift[None, :]) & 15
        value = tl.load(table + code) * scale[:, None]
        out_at = out + start[:, None] + (part * APART * 8 + place)[None, :]
        tl.store(out_at, value.to(out.dtype.element_ty), mask=inside[:, None])


def write(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    code_book: torch.Tensor | None,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    table: torch.Tensor,
    block_size: int,
    nested_block_size: int,
    out: torch.Tensor,
) -> None:
    """out [out_features, in_features] = the weight. in_features and the block size are multiples of UNIT, `codes` is
    flat and aligned to 4 bytes."""
    units_a_row = out.shape[1] // UNIT
    num_units = out.shape[0] * units_a_row
    threads = 32 * NUM_WARPS
    write_kernel[(triton.cdiv(num_units * 8, threads * PARTS),)](
        codes.view(torch.int32),
        absmax,
        code_book,
        nested_absmax,
        offset,
        table,
        out,
        num_units,
        units_a_row,
        out.stride(0),
        BLOCK_SIZE=block_size,
        NESTED_BLOCK_SIZE=nested_block_size,
        PARTS=PARTS,
        THREADS=threads,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # the absmax is a product, rounded, and a sum, rounded, as bitsandbytes has it
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernel is launched to write a weight in `dtype`: its absmax quantised again, or in fp32."""
    signature = {"words": "*i32", "table": "*fp32", "out": triton_type(dtype)}
    signature |= {"num_units": "i32", "units_a_row": "i32", "out_stride": "i32"}
    constants = {"BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256, "PARTS": PARTS, "THREADS": 32 * NUM_WARPS}
    nested = {"absmax": "*u8", "code_book": "*fp32", "nested_absmax": "*fp32", "offset": "*fp32"}
    plain = {"code_book": None, "nested_absmax": None, "offset": None}
    return [
        Compilation(write_kernel, signature | nested, constants, NUM_WARPS),
        Compilation(write_kernel, signature | {"absmax": "*fp32"}, constants | plain, NUM_WARPS),
    ]
