"""Weights in e4m3 as 16 or 32 bit, and turned as bytes: a tile a program.

The codes are read as bytes and decoded by arithmetic, so that cards without fp8 units run this too: shifted to where
fp16 has its exponent, the seven bits of a code are its magnitude / 256, also below the normal numbers.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch takes options, and constants as plain numbers)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steep.kernels import OLDEST_FP8_CARD, variants
from steep.kernels.compilation import Compilation, Type, triton_type

BLOCK = 128  # rows and columns that have one scale, where a row has none
ROWS, BLOCKS = 4, 8  # of a program of `write`: 32 codes a thread
TILE, TURNING_WARPS = 128, 8  # of a program of `transpose`: rows and columns
NUM_WARPS = 4


@triton.jit
def decoded(code):
    """The fp32 value of a byte of e4m3, to the bit."""
    magnitude = (code & 0x7F).to(tl.uint16)
    half = ((code & 0x80).to(tl.uint16) << 8) | (magnitude << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def fp8_write_kernel(
    codes,
    scale,
    out,
    num_rows,
    num_columns,
    out_stride,
    HAS_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
    column = block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    inside = (row < num_rows) & (column < num_columns)
    code = tl.load(codes + row.to(tl.int64) * num_columns + column, mask=inside, other=0)
    if HAS_BLOCKS:
        blocks_a_row = tl.cdiv(num_columns, BLOCK)
        factor = tl.load(
            scale + (row // BLOCK) * blocks_a_row + block, mask=(row < num_rows) & (block < blocks_a_row), other=0.0
        )
    else:
        factor = tl.load(scale + row, mask=row < num_rows, other=0.0)
    value = (decoded(code) * factor).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * out_stride + column, value, mask=inside)


@triton.jit
def fp8_transpose_kernel(codes, out, num_rows, num_columns, codes_stride, out_stride, TILE: tl.constexpr):
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    code = tl.load(
        codes + rows.to(tl.int64)[:, None] * codes_stride + columns[None, :],
        mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :],
    )
    tl.store(
        out + columns.to(tl.int64)[:, None] * out_stride + rows[None, :],
        tl.trans(code),
        mask=(columns < num_columns)[:, None] & (rows < num_rows)[None, :],
    )


def write(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """out [N, K], of bf16, fp16 or fp32, = codes · scale in fp32, rounded once. Rows of `out` may be apart.

    Args:
        codes: e4m3 [N, K], contiguous.
        scale: fp32 [N], or [ceil(N / 128), ceil(K / 128)] of blocks.
    """
    rows, columns = codes.shape
    variants.launch(
        fp8_write_kernel,
        (-(-rows // ROWS), -(-columns // (BLOCKS * BLOCK)), 1),
        (codes.view(torch.uint8), scale, out),
        (rows, columns, out.stride(0), scale.dim() == 2, ROWS, BLOCKS, BLOCK),
        num_warps=NUM_WARPS,
    )


def transpose(codes: torch.Tensor, out: torch.Tensor) -> None:
    """out [K, N] = codes [N, K] turned, both of one byte an element; rows of both may be apart."""
    rows, columns = codes.shape
    variants.launch(
        fp8_transpose_kernel,
        (-(-rows // TILE), -(-columns // TILE), 1),
        (codes.view(torch.uint8), out.view(torch.uint8)),
        (rows, columns, codes.stride(0), out.stride(0), TILE),
        num_warps=TURNING_WARPS,
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernels are launched: over both kinds of scale to write a weight in `dtype`, and to turn one."""
    write: dict[str, Type] = {"codes": "*u8", "scale": "*fp32", "out": triton_type(dtype)}
    turn: dict[str, Type] = {"codes": "*u8", "out": "*u8"}
    of_write, of_turn = ("num_columns", "out_stride"), ("num_rows", "num_columns", "codes_stride", "out_stride")
    write |= dict.fromkeys(("num_rows", *of_write), "i32")
    turn |= dict.fromkeys(of_turn, "i32")
    constants = {"ROWS": ROWS, "BLOCKS": BLOCKS, "BLOCK": BLOCK}
    return [
        *(
            Compilation(fp8_write_kernel, write, constants | {"HAS_BLOCKS": has_blocks}, NUM_WARPS, multiples=of_write)
            for has_blocks in (False, True)
        ),
        Compilation(fp8_transpose_kernel, turn, {"TILE": TILE}, TURNING_WARPS, OLDEST_FP8_CARD, multiples=of_turn),
    ]
