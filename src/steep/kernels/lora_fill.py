"""All of a LoRA group's weight buffer that is not W, in one launch: s·B, A, biases, and the zeros around them.

The buffer is cut into pieces, rectangles that hold one tensor each and are zero around it. Where they lie is the same
for all layers of a model and all steps: a table on the device, made once. What changes with each launch, addresses and
scales, are plain arguments. So a launch copies nothing to the device and waits for nothing.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch takes options, and constants as plain numbers; static_range unrolls)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from steep.kernels.compilation import Compilation, triton_type
from steep.kernels.variants import Grid, Prepared

MATRICES, BIASES = 6, 3  # of a launch: A and B of three projections, and their biases
TILE, BIAS_TILE = (16, 256), (128, 8)  # rows and columns
NUM_WARPS = 4
ALIGNMENT = 8  # elements: 16 bytes in 16 bit

# row, column, height and width in the buffer; then those of the tensor in the piece (0 where there is none)
Piece = tuple[int, int, int, int, int, int, int, int]
_NO_PIECE: Piece = (0, 0, 0, 8, 0, 0, 0, 8)


@triton.jit
def _number(at, ALIGNED: tl.constexpr):
    number = tl.load(at)
    if ALIGNED:
        number = tl.multiple_of(number, 8)
    return number


@triton.jit
def _write_tile(
    piece, tensor, scale, out, out_stride, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column, width = _number(piece + 1, ALIGNED), _number(piece + 3, ALIGNED)
    own_column, own_width = _number(piece + 5, ALIGNED), _number(piece + 7, ALIGNED)
    height, own_row, own_height = tl.load(piece + 2), tl.load(piece + 4), tl.load(piece + 6)
    tile, across = tl.program_id(0), tl.cdiv(width, COLUMNS)
    rows = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < height) & (columns < width)
    out_at = out + (tl.load(piece) + rows).to(tl.int64) * out_stride + (column + columns)
    rows, columns = rows - own_row, columns - own_column
    filled = (rows >= 0) & (rows < own_height) & (columns >= 0) & (columns < own_width)
    value = tl.load(tensor + rows.to(tl.int64) * own_width + columns, mask=filled, other=0).to(tl.float32) * scale
    tl.store(out_at, tl.where(filled, value, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["out_stride"])
def lora_fill_kernel(
    out,
    out_stride,  # in units of 8 elements where ALIGNED
    table,
    matrices,
    scales,
    biases,  # or None where nothing is written for them
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr,
):
    place = tl.program_id(1)
    piece = table + place * 8
    if ALIGNED:
        out_stride = out_stride * 8
    if place < len(matrices):
        matrix, scale = matrices[0], scales[0]
        for i in tl.static_range(1, len(matrices)):
            if place == i:
                matrix, scale = matrices[i], scales[i]
        _write_tile(piece, matrix, scale, out, out_stride, ALIGNED, ROWS, COLUMNS)
    elif biases is not None:
        bias = biases[0]
        for i in tl.static_range(1, len(biases)):
            if place == len(matrices) + i:
                bias = biases[i]
        _write_tile(piece, bias, 1.0, out, out_stride, False, BIAS_ROWS, BIAS_COLUMNS)


@dataclass(frozen=True)
class Launch:
    """What a launch knows of its pieces.

    Attributes:
        table: int32 [MATRICES + BIASES, 8], on the device.
        grid: tiles of the piece that has most, and pieces.
        aligned: whether the columns of all matrices begin and end at multiples of ALIGNMENT.
    """

    table: torch.Tensor
    grid: tuple[int, int]
    aligned: bool


def launches(matrices: Sequence[Piece], biases: Sequence[Piece], device: torch.device) -> tuple[Launch, ...]:
    """The launches that write these pieces: to be kept, since the device waits for their tables."""
    number = max(-(-len(matrices) // MATRICES), -(-len(biases) // BIASES))
    return tuple(
        _launch(
            matrices[MATRICES * index : MATRICES * (index + 1)], biases[BIASES * index : BIASES * (index + 1)], device
        )
        for index in range(number)
    )


def _launch(matrices: Sequence[Piece], biases: Sequence[Piece], device: torch.device) -> Launch:
    def tiles(pieces: Sequence[Piece], rows: int, columns: int) -> int:
        return max((-(-piece[2] // rows) * -(-piece[3] // columns) for piece in pieces), default=0)

    num_pieces = MATRICES + len(biases) if biases else len(matrices)
    table = _padded(matrices, MATRICES, _NO_PIECE) + _padded(biases, BIASES, _NO_PIECE)
    return Launch(
        torch.tensor(table, dtype=torch.int32, device=device),
        (max(tiles(matrices, *TILE), tiles(biases, *BIAS_TILE)), num_pieces),
        all(number % ALIGNMENT == 0 for piece in matrices for number in piece[1::2]),
    )


def _padded(values: Sequence, length: int, padding: object) -> tuple:
    return (*values, *[padding] * (length - len(values)))


def fill(
    out: torch.Tensor,
    launches: Sequence[Launch],
    matrices: Sequence[torch.Tensor],
    scales: Sequence[float],
    biases: Sequence[torch.Tensor],
    prepared: Prepared,
) -> None:
    """Write the pieces of `launches` into `out`, of bf16, fp16 or fp32, whose rows may be apart: scale · matrix, in
    fp32, rounded once; and biases. Each piece has its contiguous tensor; where it is all zero, any.

    Matrices are of one dtype, bf16, fp16 or fp32, and biases of one. `prepared` are launches that differ in `out`
    alone."""
    for number, launch in enumerate(launches):
        of_matrices = slice(MATRICES * number, MATRICES * (number + 1))
        of_biases = slice(BIASES * number, BIASES * (number + 1))

        def arguments(launch=launch, of_matrices=of_matrices, of_biases=of_biases) -> tuple[Grid, tuple[Any, ...]]:
            out_stride = out.stride(0)
            aligned = launch.aligned and out_stride % ALIGNMENT == 0
            # Places without a piece are given what is there, so that they make no variant of the kernel; never `out`,
            # which would stay alive with these arguments.
            return (*launch.grid, 1), (
                out_stride // ALIGNMENT if aligned else out_stride,
                launch.table,
                _padded(matrices[of_matrices], MATRICES, (matrices or biases)[0]),
                _padded(scales[of_matrices], MATRICES, 1.0),
                _padded(biases[of_biases], BIASES, biases[0]) if biases else None,
                aligned,
                *TILE,
                *BIAS_TILE,
            )

        prepared.launch(lora_fill_kernel, out, arguments, number=number, num_warps=NUM_WARPS)


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernel is launched over adapters of `dtype` and of fp32: aligned, with and without biases, and not."""
    signature = {"out": triton_type(dtype), "out_stride": "i32", "table": "*i32", "scales": ("fp32",) * MATRICES}
    biases = {"biases": (triton_type(dtype),) * BIASES}
    constants = dict(zip(("ROWS", "COLUMNS", "BIAS_ROWS", "BIAS_COLUMNS"), TILE + BIAS_TILE, strict=True))
    return [
        Compilation(
            lora_fill_kernel,
            signature | {"matrices": (triton_type(adapter),) * MATRICES} | written,
            constants | {"ALIGNED": aligned} | missing,
            NUM_WARPS,
        )
        for adapter in (dtype, torch.float32)
        for aligned, written, missing in ((True, biases, {}), (True, {}, {"biases": None}), (False, biases, {}))
    ]
