"""8-bit weights with a scale a row to a matrix: a piece of a row a program."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch takes options, and constants as plain numbers)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steep.kernels import variants
from steep.kernels.compilation import Compilation, triton_type

COLUMNS = 1024  # 8 a thread: 8 bytes read, 16 written
NUM_WARPS = 4


@triton.jit
def int8_write_kernel(codes, absmax, out, num_columns, codes_stride, out_stride, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < num_columns
    code = tl.load(codes + row * codes_stride + column, mask=inside, other=0)
    value = code.to(tl.float32) * tl.load(absmax + row) * 7.874015718698502e-3  # 1/127, in bitsandbytes' order
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def write(codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
    """out [out_features, in_features] = codes · absmax / 127. Rows may be apart."""
    rows, columns = out.shape
    variants.launch(
        int8_write_kernel,
        (rows, -(-columns // COLUMNS), 1),
        (codes, absmax, out),
        (columns, codes.stride(0), out.stride(0), COLUMNS),
        num_warps=NUM_WARPS,
    )


def compilations(dtype: torch.dtype) -> list[Compilation]:
    """How the kernel is launched to write a weight in `dtype`."""
    signature = {"codes": "*i8", "absmax": "*fp32", "out": triton_type(dtype)}
    signature |= {"num_columns": "i32", "codes_stride": "i32", "out_stride": "i32"}
    return [Compilation(int8_write_kernel, signature, {"COLUMNS": COLUMNS}, NUM_WARPS)]
