"""NF4 to a matrix in one pass: half a byte and a share of an absmax read, one rounded value written.

A thread takes a word of eight codes, so that it reads 4 bytes and writes 16 (in 16 bit), each next to its neighbour's.
The table's 16 values stay in the first-level cache: a read there costs less than selecting among registers did.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch takes options, and constants as plain numbers; static_range unrolls)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steep.kernels.compilation import Compilation, triton_type

CODES_A_WORD = 8
WORDS = 128  # of one step: one a thread
STEPS = 4  # of a program
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
    num_words,
    words_a_row,
    out_stride,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
):
    place = tl.arange(0, 8)
    shift = (place ^ 1) * 4  # a byte's high half comes first
    word = tl.program_id(0) * STEPS * WORDS + tl.arange(0, WORDS)
    inside = word < num_words
    packed = tl.load(words + word, mask=inside, other=0).to(tl.uint32, bitcast=True)
    scale = absmax_of(word // (BLOCK_SIZE // 8), inside, absmax, code_book, nested_absmax, offset, NESTED_BLOCK_SIZE)
    for step in tl.static_range(STEPS):
        here, is_here, codes, factor = word, inside, packed, scale
        if step + 1 < STEPS:  # the next step's reads are under way while this one's values are looked up and stored
            word += WORDS
            inside = word < num_words
            packed = tl.load(words + word, mask=inside, other=0).to(tl.uint32, bitcast=True)
            block = word // (BLOCK_SIZE // 8)
            scale = absmax_of(block, inside, absmax, code_book, nested_absmax, offset, NESTED_BLOCK_SIZE)
        code = (codes[:, None] >> shift[None, :]) & 15
        value = tl.load(table + code) * factor[:, None]
        row = here // words_a_row
        start = row.to(tl.int64) * out_stride + (here - row * words_a_row) * 8
        tl.store(out + start[:, None] + place[None, :], value.to(out.dtype.element_ty), mask=is_here[:, None])


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
    """out [out_features, in_features] = the weight. in_features is a multiple of 8, `codes` is flat and aligned to 4
    bytes."""
    words_a_row = out.shape[1] // CODES_A_WORD
    num_words = out.shape[0] * words_a_row
    write_kernel[(triton.cdiv(num_words, WORDS * STEPS),)](
        codes.view(torch.int32),
        absmax,
        code_book,
        nested_absmax,
        offset,
        table,
        out,
        num_words,
        words_a_row,
        out.stride(0),
        BLOCK_SIZE=block_size,
        NESTED_BLOCK_SIZE=nested_block_size,
        WORDS=WORDS,
        STEPS=STEPS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # the absmax is a product, rounded, and a sum, rounded, as bitsandbytes has it
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernel is launched to write a weight in `dtype`: its absmax quantised again, or in fp32."""
    signature = {"words": "*i32", "table": "*fp32", "out": triton_type(dtype)}
    signature |= {"num_words": "i32", "words_a_row": "i32", "out_stride": "i32"}
    constants = {"BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256, "WORDS": WORDS, "STEPS": STEPS}
    nested = {"absmax": "*u8", "code_book": "*fp32", "nested_absmax": "*fp32", "offset": "*fp32"}
    plain = {"code_book": None, "nested_absmax": None, "offset": None}
    return [
        Compilation(write_kernel, signature | nested, constants, NUM_WARPS),
        Compilation(write_kernel, signature | {"absmax": "*fp32"}, constants | plain, NUM_WARPS),
    ]
