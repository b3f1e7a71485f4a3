"""Products of e4m3 rows and an e4m3 weight that go on, in the same fp32 sum, with the adapters' product in 16 bit.

Added into an output that is already rounded, most of a small adapter's contribution is lost; here scales are applied
to the fp8 product in registers, the adapters' product is added there, then bias and residual, and all is rounded once.

Tensor cores of Hopper and of Ada add e4m3 products in a short accumulator: what is added to a sum much larger than it
is cut off. Over all of K at once ("fast accumulation"), a sum of one sign came out 6.6 % too small; sums of 128 columns
at most, which are then added in fp32 registers, 0.06 %. Since partial sums take as many registers as whole ones, a
program goes through the two halves of its tile's rows in turn. Of rows, not of columns: Hopper's cores take 64 rows and
up to 256 columns at a time from shared memory, and 64 x 128 read a quarter less from it for the same work than 64 x 64,
which it cannot feed. (Scales of blocks take the registers that 64 x 128 would need.) Cards with tensor memory (sm_100)
add in fp32, and go on with one sum.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# (a launch takes options, and constants as plain numbers; static_range unrolls)

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from steep.kernels import OLDEST_FP8_CARD, variants
from steep.kernels.compilation import Compilation, Type, triton_type

BLOCK = 128  # columns of a piece, rows and columns of a block, that have one scale
GROUP = 8  # tiles of rows that run beside one another, so that they read the same weight from the second-level cache


class Tile(NamedTuple):
    """Rows of either half of a program's output, and its columns; columns of both operands that it reads at a time, in
    e4m3 and in 16 bit; warps, and stages in flight.

    Attributes:
        splits: sums of `depth` products are added to the total by themselves, since the card's cores add products of
            e4m3 in a short accumulator. Where pieces and blocks have a scale they are so in any case.
    """

    half: int
    columns: int  # divides BLOCK where that has a scale
    depth: int  # divides BLOCK where that has a scale
    low_depth: int
    warps: int
    stages: int
    splits: bool = True


class Tiles(NamedTuple):
    """Of a card.

    Attributes:
        large, small: `small` where `large` ones would be fewer than FEW.
        of_blocks: where pieces and blocks have a scale.
    """

    large: Tile
    small: Tile
    of_blocks: Tile


FEW = 128
_WITHIN_99_KIB = Tiles(Tile(64, 128, 64, 32, 8, 3), Tile(32, 64, 128, 64, 4, 3), Tile(64, 128, 64, 32, 8, 3))
_LARGEST = Tile(128, 128, 128, 32, 8, 3, splits=False)
# By compute capability, from which on. All were compiled; sm_90's `large` was timed beside six others on an H200
# (`benchmarks.fp8_tiles`): a `low_depth` of 32 is as fast, all others are slower.
TILES: dict[tuple[int, int], Tiles] = {
    (8, 9): _WITHIN_99_KIB,
    (9, 0): Tiles(Tile(64, 128, 128, 64, 4, 3), Tile(64, 64, 128, 64, 4, 4), Tile(64, 128, 128, 64, 8, 4)),
    (10, 0): Tiles(_LARGEST, _LARGEST._replace(half=64), Tile(128, 64, 128, 64, 8, 4)),
    (12, 0): _WITHIN_99_KIB,
}


def tiles_of(capability: tuple[int, int]) -> Tiles:
    return TILES[max(known for known in TILES if known <= capability)]


def tile_of(tiles: Tiles, tokens: int, columns: int, has_blocks: bool) -> Tile:
    """For an output [tokens, columns]."""
    if has_blocks:
        return tiles.of_blocks
    large = tiles.large
    return tiles.small if -(-tokens // (2 * large.half)) * -(-columns // large.columns) < FEW else large


@triton.jit
def _place(rows_in_tiles, columns_in_tiles, GROUP: tl.constexpr):
    """The tile of this program: GROUP rows of tiles are gone through column by column."""
    program = tl.program_id(0)
    group = program // (GROUP * columns_in_tiles)
    height = tl.minimum(rows_in_tiles - group * GROUP, GROUP)
    inside = program - group * GROUP * columns_in_tiles
    return group * GROUP + inside % height, inside // height


@triton.jit
def _load(at, inner, left, EVEN: tl.constexpr):
    return tl.load(at) if EVEN else tl.load(at, mask=inner < left, other=0.0)


@triton.jit
def _added(
    total, x_tile, weight_tile, x_scale, weight_scale, block, HAS_BLOCKS: tl.constexpr, SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The total and the product of two tiles, which lie in the rows' piece and the weight's block number `block`."""
    if HAS_BLOCKS:
        partial = tl.dot(x_tile, weight_tile, max_num_imprecise_acc=DEPTH)
        total += partial * (tl.load(x_scale + block) * tl.load(weight_scale + block))[:, None]
    elif SPLIT:
        # Given `total` to add to, Triton 3.7 adds the partial sum to it without waiting for it.
        total += tl.dot(x_tile, weight_tile, max_num_imprecise_acc=DEPTH)
    else:
        total = tl.dot(x_tile, weight_tile, total)
    return total


@triton.jit
def _scaled(total, x_scale_at, weight_scale, columns, num_columns):
    total *= tl.load(x_scale_at)[:, None]
    if weight_scale is not None:
        total *= tl.load(weight_scale + columns, mask=columns < num_columns, other=0.0)[None, :]
    return total


@triton.jit
def _finish(total, bias, add, out, rows, columns, num_rows, num_columns, add_stride, out_stride):
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if bias is not None:
        total += tl.load(bias + columns, mask=columns < num_columns, other=0.0)[None, :]
    if add is not None:
        add_at = add + rows.to(tl.int64)[:, None] * add_stride + columns[None, :]
        total += tl.load(add_at, mask=inside, other=0.0).to(tl.float32)
    out_at = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def fp8_product_kernel(
    x,
    x_scale,
    weight,
    weight_scale,  # or None: 1
    out,
    low,  # or None
    b,
    bias,  # or None
    add,  # or None
    num_rows,
    num_columns,
    depth,
    x_stride,
    weight_stride,
    out_stride,
    add_stride,
    low_stride,
    b_row_stride,
    b_column_stride,
    stops,  # of the outputs of each part
    starts,  # of its columns in `low`, in units of 8
    widths,  # of its columns, in units of 8
    HAS_BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,  # whether DEPTH divides depth
    SPLIT: tl.constexpr,  # whether sums of DEPTH are added by themselves
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOW_DEPTH: tl.constexpr,
):
    row_tile, column_tile = _place(tl.cdiv(num_rows, 2 * HALF), tl.cdiv(num_columns, COLUMNS), GROUP)
    rows = row_tile * (2 * HALF) + tl.arange(0, HALF)
    others = rows + HALF  # the other half of the tile
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    # What is read beyond the last row or column is that one again, and not written.
    read_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    read_others = tl.minimum(others, num_rows - 1).to(tl.int64)
    read_columns = tl.minimum(columns, num_columns - 1).to(tl.int64)
    inner = tl.arange(0, DEPTH)
    x_at = x + read_rows[:, None] * x_stride + inner[None, :]
    other_at = x + read_others[:, None] * x_stride + inner[None, :]
    weight_at = weight + read_columns[None, :] * weight_stride + inner[:, None]
    total = tl.zeros((HALF, COLUMNS), dtype=tl.float32)
    other_total = tl.zeros((HALF, COLUMNS), dtype=tl.float32)
    if HAS_BLOCKS:  # the weight has one scale at a time
        blocks = tl.cdiv(depth, BLOCK)
        x_scale_at = x_scale + read_rows * blocks
        other_scale_at = x_scale + read_others * blocks
        weight_scale_at = weight_scale + column_tile * COLUMNS // BLOCK * blocks
    else:
        x_scale_at, other_scale_at = x_scale + read_rows, x_scale + read_others
        weight_scale_at = weight_scale
    for start in range(0, depth, DEPTH):
        block, left = start // BLOCK, depth - start
        weight_tile = _load(weight_at, inner[:, None], left, EVEN)
        x_tile = _load(x_at, inner[None, :], left, EVEN)
        other_tile = _load(other_at, inner[None, :], left, EVEN)
        total = _added(total, x_tile, weight_tile, x_scale_at, weight_scale_at, block, HAS_BLOCKS, SPLIT, DEPTH)
        other_total = _added(
            other_total, other_tile, weight_tile, other_scale_at, weight_scale_at, block, HAS_BLOCKS, SPLIT, DEPTH
        )
        weight_at += DEPTH
        x_at += DEPTH
        other_at += DEPTH
    if not HAS_BLOCKS:
        total = _scaled(total, x_scale_at, weight_scale, columns, num_columns)
        other_total = _scaled(other_total, other_scale_at, weight_scale, columns, num_columns)

    if low is not None:
        start, width = starts[0], widths[0]
        for i in tl.static_range(1, len(stops)):
            if column_tile * COLUMNS >= stops[i - 1]:
                start, width = starts[i], widths[i]
        start, width = start * 8, width * 8
        low_inner = tl.arange(0, LOW_DEPTH)
        low_at = low + read_rows[:, None] * low_stride + (start + low_inner)[None, :]
        other_low_at = low + read_others[:, None] * low_stride + (start + low_inner)[None, :]
        b_at = b + columns.to(tl.int64)[None, :] * b_row_stride + low_inner.to(tl.int64)[:, None] * b_column_stride
        for at in range(0, width, LOW_DEPTH):
            within = low_inner < width - at
            b_tile = tl.load(b_at, mask=within[:, None] & (columns < num_columns)[None, :], other=0.0)
            total = tl.dot(tl.load(low_at, mask=within[None, :], other=0.0), b_tile, total)
            other_total = tl.dot(tl.load(other_low_at, mask=within[None, :], other=0.0), b_tile, other_total)
            low_at += LOW_DEPTH
            other_low_at += LOW_DEPTH
            b_at += LOW_DEPTH * b_column_stride
    _finish(total, bias, add, out, rows, columns, num_rows, num_columns, add_stride, out_stride)
    _finish(other_total, bias, add, out, others, columns, num_rows, num_columns, add_stride, out_stride)


def product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    out: torch.Tensor,
    low: torch.Tensor | None,
    b: torch.Tensor | None,
    parts: Sequence[tuple[int, int, int, int]],
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    tile: Tile | None = None,
) -> None:
    """As `steep.ops.fp8_product.fp8_product`, in one launch; where a part ends within a tile, in one launch a part."""
    tile = tile or tile_of(_tiles_on(x.device), out.shape[0], out.shape[1], x_scale.dim() == 2)
    assert x_scale.dim() == 1 or BLOCK % tile.columns == 0, "the weight has one scale at a time"
    if low is None or b is None or not any(width for *_, width in parts):
        parts = [(0, out.shape[1], 0, 0)]
        low = b = None
    if all(stop % tile.columns == 0 for _, stop, _, _ in parts[:-1]):
        _launch(x, x_scale, weight, weight_scale, out, low, b, parts, bias, add, tile)
        return
    for start, stop, column, width in parts:
        own = slice(start, stop)
        of_part = None
        if weight_scale is not None:
            of_part = weight_scale[start // BLOCK : -(-stop // BLOCK)] if weight_scale.dim() == 2 else weight_scale[own]
        _launch(
            x,
            x_scale,
            weight[own],
            of_part,
            out[:, own],
            low,
            None if b is None else b[own],
            [(0, stop - start, column, width)],
            None if bias is None else bias[own],
            None if add is None else add[:, own],
            tile,
        )


def _launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    out: torch.Tensor,
    low: torch.Tensor | None,
    b: torch.Tensor | None,
    parts: Sequence[tuple[int, int, int, int]],
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    tile: Tile,
) -> None:
    (tokens, depth), columns = x.shape, weight.shape[0]
    assert x.stride(0) % 16 == weight.stride(0) % 16 == 0, (x.stride(), weight.stride())
    assert low is None or low.stride(0) % 8 == 0, low.stride()
    has_blocks = x_scale.dim() == 2
    variants.launch(
        fp8_product_kernel,
        (-(-tokens // (2 * tile.half)) * -(-columns // tile.columns), 1, 1),
        (x, x_scale, weight, weight_scale, out, low, b, bias, add),
        (
            columns,
            depth,
            x.stride(0),
            weight.stride(0),
            out.stride(0),
            0 if add is None else add.stride(0),
            0 if low is None else low.stride(0),
            *((0, 0) if b is None else b.stride()),
            tuple([stop for _, stop, _, _ in parts]),
            tuple([column // 8 for _, _, column, _ in parts]),
            tuple([-(-width // 8) for *_, width in parts]),
            has_blocks,
            depth % tile.depth == 0,
            tile.splits,
            BLOCK,
            GROUP,
            tile.half,
            tile.columns,
            tile.depth,
            tile.low_depth,
        ),
        free=(tokens,),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@cache
def _tiles_on(device: torch.device) -> Tiles:
    return tiles_of(torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST_FP8_CARD)


class _Case(NamedTuple):
    """A launch of a layer's pass: what it is handed, and how b stands in memory."""

    parts: int
    bias: bool = False
    stream: torch.dtype | None = None  # of `add` and `out`; None: nothing is added
    adapters: bool = True
    backward: bool = False  # b's columns are contiguous, and a scale a row is in dy
    even: bool = True


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernel is launched on each card, each tile of its own: over q, k and v (Qwen's have biases), gate and up,
    o or down, into a stream in fp32 too, a layer without adapters, and backward."""
    qkv, gate_up, added, backward = _Case(3), _Case(2), _Case(1, stream=dtype), _Case(1, backward=True)
    with_bias, into_fp32 = qkv._replace(bias=True), added._replace(stream=torch.float32)
    all_cases = [qkv, with_bias, gate_up, added, into_fp32, added._replace(adapters=False), backward]
    uneven = qkv._replace(even=False)
    found: list[Compilation] = []
    for (capability, tiles), until in zip(TILES.items(), [*list(TILES)[1:], None], strict=True):
        for tile, has_blocks, cases in (
            (tiles.large, False, all_cases),
            (tiles.small, False, [uneven, added, backward]),
            (tiles.of_blocks, True, [uneven, *all_cases]),
        ):
            for case in cases:
                constants = _constants(tile, has_blocks, case)
                signature, multiples = _signature(dtype, case)
                found.append(
                    Compilation(
                        fp8_product_kernel, signature, constants, tile.warps, capability, until, tile.stages, multiples
                    )
                )
    return found


def _signature(dtype: torch.dtype, case: _Case) -> tuple[dict[str, Type], tuple[str, ...]]:
    """Of all arguments, and those that are multiples of 16."""
    e4m3, in_16_bit, out = triton_type(torch.float8_e4m3fn), triton_type(dtype), triton_type(case.stream or dtype)
    signature: dict[str, Type] = {"x": e4m3, "x_scale": "*fp32", "weight": e4m3, "weight_scale": "*fp32"}
    signature |= {"out": out, "low": in_16_bit, "b": in_16_bit, "bias": "*fp32", "add": out}
    strides = "x_stride", "weight_stride", "out_stride", "add_stride", "low_stride", "b_row_stride", "b_column_stride"
    multiples = "num_columns", "depth", *strides
    signature |= dict.fromkeys(("num_rows", *multiples), "i32")
    return signature | dict.fromkeys(("stops", "starts", "widths"), ("i32",) * case.parts), multiples


def _constants(tile: Tile, has_blocks: bool, case: _Case) -> dict[str, object]:
    constants: dict[str, object] = dict(zip(("HALF", "COLUMNS", "DEPTH", "LOW_DEPTH"), tile, strict=False))
    constants |= {"HAS_BLOCKS": has_blocks, "EVEN": case.even, "SPLIT": tile.splits, "BLOCK": BLOCK, "GROUP": GROUP}
    if case.adapters:
        constants["b_row_stride" if case.backward else "b_column_stride"] = 1
    absent = {"low": not case.adapters, "b": not case.adapters, "bias": not case.bias, "add": case.stream is None}
    absent["weight_scale"] = case.backward and not has_blocks
    return constants | {name: None for name, is_absent in absent.items() if is_absent}
