"""AdamW with 8-bit states over many tensors in one launch.

A program is one warp that updates BLOCKS blocks of 256 elements of one tensor, one after the other; tables say where
each tensor's parts are. What bounds the kernel is less memory than the arithmetic of writing the moments back as codes,
so that is done without a search:

**Encoding.** The code book of bitsandbytes has seven decades, (10^-7, 10^-6] ... (0.1, 1]. Each is cut into equal bins,
of which a code is the middle; the next smaller decade has half as many bins. As a function of |x|, the number of bins
below it is therefore linear in each decade, with a slope that falls by 5 from one to the next larger. Such a concave
function is a sum of weights times min(|x| 10^k, 1), and a multiplication that saturates at 1 is one instruction: six of
them and seven multiply-adds give the bin, with no table and no branch. (The smallest of seven lines is as many
instructions, but minima run at half the rate of multiplications.) Within a decade the edge of a bin is the midpoint of
two codes. At a decade's lower end, which is where the number of bins is a power of two, that midpoint lies 0.2 bins
higher, since the bins below are a fifth as wide: the bin is taken with and without those 0.2. Zero and 1 are codes of
their own: the line of the smallest decade is bent for the one, a step added for the other (there is no -1). The result
is the nearest code, but for values within 1e-4 bins of a midpoint, which may take either.

**Rounding.** A bf16 weight is rounded by 16 random bits below its last one. They come from a hash of the tensor's key,
the block and the element, one hash of 32 bits to two elements: no state, the same bits in every order. With an fp32
master, of which the weight is the upper half and an int16 the rest (`steep.ops.master_weights`), it is rounded to the
nearest, and no noise is drawn.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch takes options; constants are plain numbers and types; static_range unrolls)

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from steep.kernels import variants
from steep.kernels.compilation import Compilation

BLOCK = 256  # elements that share one scale: 8 a thread, read as one vector of 16 bytes
BLOCKS = 16  # of them a program
CHUNK = BLOCKS * BLOCK
NUM_WARPS = 1  # the largest of a block is found without shared memory
ALIGNMENT = 16  # bytes

# Columns of the two tables, whose rows are padded: a launch may take some rows of a table, and is specialised for
# addresses that are aligned.
ADDRESSES = (
    "parameter", "gradient", "moment1", "moment2", "scale1", "scale2", "numel", "first_chunk", "key", "rows", "width",
    "first_element", "chunks", "low",
)  # fmt: skip
SETTINGS = ("decay", "step_size", "epsilon", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2")
ROW, SETTINGS_ROW = 14, 8
NAN = tl.constexpr(0x7FC00000)  # bits of one whose lower half is zero

_ROW = tl.constexpr(ROW)
_SETTINGS_ROW = tl.constexpr(SETTINGS_ROW)
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _mix(x):
    """A bijection of 32 bits in which every bit of the result depends on every bit of x (Wellons' lowbias32)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _bin(x, TOP: tl.constexpr, SLOPE: tl.constexpr, START: tl.constexpr):
    """The number of the bin that |x| lies in, in the low byte of an int32, where the largest decade has TOP bins.

    |x| is at most 1; x near 1 (not -1) is one bin more, 2 TOP. SLOPE and START are the line of the smallest decade,
    bent so that zero's neighbour begins at its midpoint.
    """
    # The line of the second smallest decade begins at NEXT; the smallest adds what is missing up to their crossing.
    NEXT: tl.constexpr = TOP * 8 / 9 / 32
    BASE: tl.constexpr = 2 * TOP  # beside it an fp32 number has a fixed point: the bin, then 16 bits (TOP 64) or 15
    SHIFT: tl.constexpr = 16 if TOP == 64 else 15
    size = tl.abs(x)
    line = BASE + START + tl.clamp(size * ((SLOPE - TOP / 0.9 * 5**5) / (NEXT - START)), 0.0, 1.0) * (NEXT - START)
    for less in tl.static_range(5):
        line += tl.clamp(size * 10 ** (5 - less), 0.0, 1.0) * (TOP / 0.9 * 0.8 / 2 ** (5 - less))
    line += size * (TOP / 0.9)
    line += tl.clamp(x * 2**23 - (1 - 0.225 / TOP) * 2**23, 0.0, 1.0)
    here = line.to(tl.int32, bitcast=True)
    below = here - int(0.2 * 2**SHIFT)
    # Their integers share a bit unless that of `here` is a power of two and that of `below` one less.
    return tl.where((here & below & (2**23 - 2**SHIFT)) == 0, below, here) >> SHIFT


@triton.jit
def encode_signed(x):
    """The nearest code of bitsandbytes' signed dynamic map for x in [-1, 1]: 127 is zero, 255 is 1."""
    return (_bin(x, 64, 1e6 / 0.9, 1.2 - 0.275 / 0.9) * tl.where(x < 0, -1, 1) + 127).to(tl.uint8)


@triton.jit
def encode_unsigned(x):
    """The nearest code of bitsandbytes' unsigned dynamic map for x in [0, 1]: 0 is zero, 255 is 1."""
    return (_bin(x, 128, 0.8e7 / 3.875, 2.2 - 1.625 * 0.8 / 3.875) - 1).to(tl.uint8)


@triton.jit
def _address(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _read(pointers, there, WHOLE: tl.constexpr):
    return tl.load(pointers) if WHOLE else tl.load(pointers, there, 0)


@triton.jit
def _write(pointers, values, there, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, there)


@triton.jit
def _update(
    row, setting, map1, map2, factor, start, left,
    WHOLE: tl.constexpr, DTYPE: tl.constexpr, GRADIENT: tl.constexpr, CODED: tl.constexpr, ALIGNED: tl.constexpr,
    SCALED: tl.constexpr, ROWS: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the `left` elements of one tensor from `start` on; WHOLE: in whole blocks."""
    decay, step_size, epsilon = tl.load(setting), tl.load(setting + 1), tl.load(setting + 2)
    beta1, rest1 = tl.load(setting + 3), tl.load(setting + 4)
    beta2, rest2 = tl.load(setting + 5), tl.load(setting + 6)
    if SCALED:
        scale = tl.load(factor)
        rest1, rest2 = rest1 * scale, rest2 * scale * scale
    STOCHASTIC: tl.constexpr = DTYPE == tl.bfloat16 and not MASTER  # noqa: SIM300
    MOMENT: tl.constexpr = tl.uint8 if CODED else tl.float32
    parameters = _address(row, 0, DTYPE, ALIGNED) + start
    gradients = _address(row, 1, GRADIENT, ALIGNED)
    if ROWS:
        places = _address(row, 9, tl.int32, False)
        width = tl.load(row + 10)
        element = tl.load(row + 11) + start  # of the whole table
        first_row = element // width
        first_column = (element - first_row * width).to(tl.int32)
        width32 = width.to(tl.int32)
    else:
        gradients += start
    moments1 = _address(row, 2, MOMENT, ALIGNED) + start
    moments2 = _address(row, 3, MOMENT, ALIGNED) + start
    scales1 = _address(row, 4, tl.float32, False) + start // BLOCK
    scales2 = _address(row, 5, tl.float32, False) + start // BLOCK
    if MASTER:
        lows = _address(row, 13, tl.int16, ALIGNED) + start
    key = tl.load(row + 8)
    key1, key2 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    first_block = (start // BLOCK).to(tl.uint32)

    lane = tl.arange(0, BLOCK)
    for block in range(tl.cdiv(left, BLOCK)):
        inside = block * BLOCK + lane
        there = inside < left
        first = _read(moments1 + inside, there, WHOLE)
        second = _read(moments2 + inside, there, WHOLE)
        if ROWS:
            column = first_column + inside
            down = column // width32
            place = _read(places + first_row + down, there, WHOLE).to(tl.int64)
            column -= down * width32
            gradient = tl.load(gradients + place * width + column, there & (place >= 0), 0.0).to(tl.float32)
        else:
            gradient = _read(gradients + inside, there, WHOLE).to(tl.float32)
        value = _read(parameters + inside, there, WHOLE).to(tl.float32)
        if MASTER:
            bits = value.to(tl.int32, bitcast=True) + _read(lows + inside, there, WHOLE).to(tl.int32)
            value = bits.to(tl.float32, bitcast=True)
        if CODED:
            has_block = block * BLOCK < left
            kept1 = beta1 * _read(scales1 + block, has_block, WHOLE)
            kept2 = beta2 * _read(scales2 + block, has_block, WHOLE)
            first = tl.load(map1 + first.to(tl.int32)) * kept1 + gradient * rest1
            second = tl.load(map2 + second.to(tl.int32)) * kept2 + gradient * gradient * rest2
        else:
            first = first * beta1 + gradient * rest1
            second = second * beta2 + gradient * gradient * rest2

        # A division by way of a root: Triton's takes ten instructions, for divisors near the ends of fp32.
        # Its square has to be a normal number.
        divisor = tl.maximum(tl.sqrt(second) + epsilon, 1e-18)
        value = value * decay - step_size * (first * tl.rsqrt(divisor * divisor))
        if STOCHASTIC:
            seed = _mix((first_block + block) ^ key1) ^ key2
            drawn = _mix(seed + tl.arange(0, BLOCK // 2).to(tl.uint32) * 0x9E3779B9)
            noise = tl.reshape(tl.join(drawn & 0xFFFF, drawn >> 16), (BLOCK,))
            noise = tl.where(value == value, noise, 0)  # a GPU's NaN is all ones: a carry would make it -0
            bits = (value.to(tl.uint32, bitcast=True) + noise) >> 16
            _write(parameters + inside, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), there, WHOLE)
        elif MASTER:
            bits = tl.where(value == value, value.to(tl.int32, bitcast=True), NAN)
            upper = (bits + 0x8000) >> 16
            _write(parameters + inside, upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), there, WHOLE)
            _write(lows + inside, (bits - (upper << 16)).to(tl.int16), there, WHOLE)
        else:
            _write(parameters + inside, value, there, WHOLE)

        if CODED:
            if not WHOLE:  # what lies past the end counts for nothing in a block's scale
                first, second = tl.where(there, first, 0.0), tl.where(there, second, 0.0)
            scale1, scale2 = tl.max(tl.abs(first)), tl.max(second)
            _write(scales1 + block, scale1, has_block, WHOLE)
            _write(scales2 + block, scale2, has_block, WHOLE)
            # A block of zeros, or of what is too small to be inverted, is coded as zeros.
            first = encode_signed(first * (1 / tl.maximum(scale1, 1e-37)))
            second = encode_unsigned(second * (1 / tl.maximum(scale2, 1e-37)))
        _write(moments1 + inside, first, there, WHOLE)
        _write(moments2 + inside, second, there, WHOLE)


@triton.jit
def adamw8bit_kernel(
    addresses, settings, owners, map1, map2, factor,
    DTYPE: tl.constexpr, GRADIENT: tl.constexpr, CODED: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Update one chunk, BLOCKS blocks of one tensor.

    addresses: int64 [tensors, ROW] and settings: fp32 [tensors, SETTINGS_ROW], columns as ADDRESSES and SETTINGS.
    owners: [chunks], the tensor of each chunk. map1, map2: fp32 [256]. factor: fp32 [1], of gradients (SCALED).
    DTYPE: of the parameters; bf16 is rounded stochastically. CODED: the moments are codes, not fp32.
    ROWS: the gradient has some rows of a table alone, and a map says where each is (-1: it is zero).
    MASTER: the parameters are bf16 with fp32 masters.
    """
    CHUNK: tl.constexpr = BLOCKS * BLOCK
    chunk = tl.program_id(0)
    tensor = tl.load(owners + chunk)
    row = addresses + tensor * _ROW
    setting = settings + tensor * _SETTINGS_ROW
    start = (chunk - tl.load(row + 7)) * CHUNK
    left = tl.load(row + 6) - start
    if left >= CHUNK:
        _update(row, setting, map1, map2, factor, start, CHUNK,
                True, DTYPE, GRADIENT, CODED, ALIGNED, SCALED, ROWS, MASTER, BLOCK)  # fmt: skip
    else:
        _update(row, setting, map1, map2, factor, start, left.to(tl.int32),
                False, DTYPE, GRADIENT, CODED, ALIGNED, SCALED, ROWS, MASTER, BLOCK)  # fmt: skip


def launch(
    addresses: torch.Tensor,
    settings: torch.Tensor,
    owners: torch.Tensor,
    maps: tuple[torch.Tensor, torch.Tensor],
    factor: torch.Tensor | None,
    *,
    parameter: torch.dtype,
    gradient: torch.dtype,
    coded: bool,
    aligned: bool,
    rows: bool,
    masters: bool,
) -> None:
    """Update every tensor of the tables, all of one kind, in one launch.

    Args:
        addresses: int64 [tensors, ROW], of contiguous tensors.
        settings: fp32 [tensors, SETTINGS_ROW].
        owners: int32 or int64 [chunks]: the row of each CHUNK elements, in order.
        maps: bitsandbytes' dynamic maps, signed and unsigned, fp32 [256] each; read where `coded`.
        factor: fp32 [1], multiplies each gradient.
        parameter: bf16 (rounded stochastically) or fp32.
        gradient: bf16, fp16 or fp32.
        coded: the moments are 8-bit codes, else fp32.
        aligned: every address of a parameter, gradient, moment or master is a multiple of ALIGNMENT bytes.
        rows: gradients are of some rows alone.
        masters: parameters are bf16, each with an fp32 master.
    """
    variants.launch(
        adamw8bit_kernel,
        (owners.numel(), 1, 1),
        (addresses, settings, owners, *maps, settings if factor is None else factor),
        tuple(_constants(parameter, gradient, coded, aligned, factor is not None, rows, masters).values()),
        num_warps=NUM_WARPS,
    )


@lru_cache(maxsize=64)  # of few kinds
def _constants(
    parameter: torch.dtype,
    gradient: torch.dtype,
    coded: bool,
    aligned: bool,
    scaled: bool,
    rows: bool,
    masters: bool,
) -> dict[str, object]:
    """In the kernel's order."""
    return {
        "DTYPE": _TYPES[parameter],
        "GRADIENT": _TYPES[gradient],
        "CODED": coded,
        "ALIGNED": aligned,
        "SCALED": scaled,
        "ROWS": rows,
        "MASTER": masters,
        "BLOCK": BLOCK,
        "BLOCKS": BLOCKS,
    }


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernel is launched for trained tensors in `dtype` (bf16; fp16 trains over fp32 masters), or in fp32."""
    signature = dict.fromkeys(("settings", "map1", "map2", "factor"), "*fp32") | {"addresses": "*i64", "owners": "*i64"}
    kinds = [(torch.float32, torch.float32)]
    if dtype == torch.bfloat16:
        kinds += [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    flags = [
        (coded, True, rows, masters) for coded in (True, False) for rows in (False, True) for masters in (False, True)
    ]
    flags += [(True, False, rows, False) for rows in (False, True)]  # as of the few that are not aligned
    return [
        Compilation(adamw8bit_kernel, signature, _constants(*kind, coded, aligned, True, rows, masters), NUM_WARPS)
        for kind in kinds
        for coded, aligned, rows, masters in flags
        if kind[0] == torch.bfloat16 or not masters
    ]
