"""Products of rows and a weight in e4m3, with the adapters' product in the same fp32 sum, rounded once.

    out = (codes of the rows · codes of the weightᵀ) · their scales  +  low · Bᵀ  +  bias  +  add

Where scales are those of pieces of 128 columns and blocks of 128 x 128, each 128 columns' product is multiplied by its
own before it is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from steep.ops.backend import uses_kernels
from steep.ops.fp8 import BLOCK, Fp8Rows, dequantise_rows


class LowPart(NamedTuple):
    """Outputs from `start` to `stop` read the columns of `low` from `column` on, as many as `width`."""

    start: int
    stop: int
    column: int
    width: int


def fp8_product(
    rows: Fp8Rows,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    *,
    low: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    parts: Sequence[LowPart] = (),
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
) -> None:
    """Write into `out` [T, N] of bf16, fp16 or fp32, rounded once.

    Args:
        rows: [T, K].
        codes: e4m3 [N, K], its rows a multiple of 16 elements apart.
        scale: fp32 [N]; fp32 [ceil(N / 128), ceil(K / 128)] where the rows have pieces; None: 1.
        low: [T, any], bf16 or fp16, its rows a multiple of 8 elements apart.
        b: [N, widest of `parts`], of low's dtype; one of its strides is 1.
        parts: one behind the other, of all N outputs; their columns are multiples of 8.
        bias: fp32 [N].
        add: [T, N] of out's dtype; may be `out`.
    """
    tokens, columns = rows.codes.shape
    assert codes.shape[1] == columns and out.shape == (tokens, codes.shape[0]), (codes.shape, out.shape)
    assert out.stride(1) == codes.stride(1) == rows.codes.stride(1) == 1, (out.stride(), codes.stride())
    assert add is None or (add.shape, add.dtype, add.stride(1)) == (out.shape, out.dtype, 1), (add.shape, add.dtype)
    assert rows.has_pieces == (scale is not None and scale.dim() == 2), "pieces meet blocks, rows meet rows"
    if not uses_kernels(out):
        out.copy_(fp8_product_reference(rows, codes, scale, low=low, b=b, parts=parts, bias=bias, add=add))
        return
    from steep.kernels import fp8_linear

    fp8_linear.product(rows.codes, rows.scale, codes, scale, out, low, b, parts, bias, add)


def fp8_product_reference(
    rows: Fp8Rows,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    *,
    low: torch.Tensor | None,
    b: torch.Tensor | None,
    parts: Sequence[LowPart],
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
) -> torch.Tensor:
    """In fp32 [T, N], of the same rows and codes."""
    weight = codes.float()
    if scale is not None and scale.dim() == 2:
        wide = scale.repeat_interleave(BLOCK, 0)[: len(weight)].repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
        weight = weight * wide
    elif scale is not None:
        weight = weight * scale[:, None]
    result = dequantise_rows(rows) @ weight.t()
    for start, stop, column, width in parts:
        assert low is not None and b is not None
        result[:, start:stop] += low[:, column : column + width].float() @ b[start:stop, :width].float().t()
    if bias is not None:
        result += bias
    return result if add is None else result + add.float()
