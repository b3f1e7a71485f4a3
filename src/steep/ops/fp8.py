"""Numbers in e4m3 (8 bit, 3 of them mantissa, up to 448): frozen weights, and rows that a product reads.

    weight      W = codes · scale of the row                       made from a 16-bit checkpoint
                W = codes · scale of the block of 128 x 128        as some checkpoints are published
    rows        values · factors = codes · scale of the row, or of each 128 columns of it

A scale is the largest magnitude divided by 448, so that this one becomes the largest code. Rows meet weights with a
scale a row, pieces of rows those with blocks: products then need no other scale than one a row or piece of either side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steep.ops.backend import uses_kernels
from steep.ops.slices import columns_of

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
BLOCK = 128
SMALLEST = 2.0**-100  # what stands for a largest magnitude of less: its inverse is finite


@dataclass(frozen=True)
class Fp8Weight:
    """A frozen weight [out_features, in_features].

    Attributes:
        codes: e4m3 [out_features, in_features], contiguous.
        scale: fp32, contiguous: [out_features], or [ceil(out_features / 128), ceil(in_features / 128)] of blocks.

    Raises:
        ValueError: the parts are not of such a storage.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype != E4M3 or self.codes.dim() != 2 or not self.codes.is_contiguous():
            raise ValueError(f"fp8 storage: `codes` is {self.codes.dtype} {list(self.codes.shape)}, no matrix of e4m3.")
        rows, columns = self.codes.shape
        expected = [(rows,), (-(-rows // BLOCK), -(-columns // BLOCK))]
        if self.scale.dtype != torch.float32 or tuple(self.scale.shape) not in expected:
            raise ValueError(
                f"fp8 storage: `scale` is {self.scale.dtype} {list(self.scale.shape)}; torch.float32 of "
                f"{list(expected[0])} or {list(expected[1])} is expected."
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def has_blocks(self) -> bool:
        """Whether a scale is that of a block of 128 x 128."""
        return self.scale.dim() == 2

    def write(self, out: torch.Tensor) -> None:
        """Write the weight into `out` [out_features, in_features] of bf16, fp16 or fp32, rounded once from fp32. Its
        rows may be apart."""
        assert tuple(out.shape) == self.shape and out.stride(1) == 1, (out.shape, out.stride(), self.shape)
        if not uses_kernels(out):
            out.copy_(fp8_reference(self))
            return
        from steep.kernels import fp8_weight

        fp8_weight.write(self.codes, self.scale, out)


@dataclass(frozen=True)
class Fp8Rows:
    """Where rows [T, n] are written in e4m3 by the op that computes them, for a product to read.

    Attributes:
        codes: e4m3 [T, n]; its rows may be apart, by a multiple of 16 elements.
        scale: fp32, contiguous: [T], or [T, ceil(n / 128)] of pieces.
        factors: fp32 [n], what each column is multiplied by before, or None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    factors: torch.Tensor | None = None

    @property
    def has_pieces(self) -> bool:
        """Whether a scale is that of 128 columns of a row."""
        return self.scale.dim() == 2

    def parts(self, tokens: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """codes, scale and factors, for a kernel that writes [tokens, columns] of these."""
        codes, scale, factors = self.codes, self.scale, self.factors
        assert codes.dtype == E4M3 and codes.shape == (tokens, columns), (codes.dtype, codes.shape)
        assert codes.stride(1) == 1 and codes.stride(0) % 16 == 0, codes.stride()
        assert scale.dtype == torch.float32 and scale.is_contiguous(), (scale.dtype, scale.stride())
        assert scale.shape == ((tokens, -(-columns // BLOCK)) if self.has_pieces else (tokens,)), scale.shape
        if factors is not None:
            assert factors.dtype == torch.float32 and factors.shape == (columns,), (factors.dtype, factors.shape)
            assert factors.is_contiguous(), factors.stride()
        return codes, scale, factors


def empty_fp8_rows(
    tokens: int, columns: int, device: torch.device, *, pieces: bool, factors: torch.Tensor | None = None
) -> Fp8Rows:
    """Rows to write into."""
    width = -(-columns // 16) * 16
    codes = columns_of(torch.empty(tokens, width, dtype=E4M3, device=device), slice(0, columns))
    scale = torch.empty((tokens, -(-columns // BLOCK)) if pieces else (tokens,), dtype=torch.float32, device=device)
    return Fp8Rows(codes, scale, factors)


def quantise_reference(values: torch.Tensor, rows: Fp8Rows) -> None:
    """Write `values` [T, n], in fp32 times the factors, into `rows`. Where one is infinite or undefined, so is what its
    row or piece stands for: nothing is saturated."""
    values = values.float()
    if rows.factors is not None:
        values = values * rows.factors
    tokens, columns = values.shape
    size = BLOCK if rows.has_pieces else columns
    pieces = torch.nn.functional.pad(values, (0, -columns % size)).view(tokens, -1, size)
    largest = pieces.abs().amax(2, keepdim=True).clamp(min=SMALLEST)
    codes = (pieces * (LARGEST / largest)).to(E4M3).view(tokens, -1)[:, :columns]
    rows.codes.copy_(codes)
    rows.scale.copy_((largest / LARGEST).view_as(rows.scale))


def dequantise_rows(rows: Fp8Rows) -> torch.Tensor:
    """codes · scale, in fp32 [T, n]: the values times the factors, as the product sees them."""
    scale = rows.scale if rows.has_pieces else rows.scale[:, None]
    columns = rows.codes.shape[1]
    return rows.codes.float() * scale.repeat_interleave(BLOCK if rows.has_pieces else columns, 1)[:, :columns]


def quantise_weight(weight: torch.Tensor) -> Fp8Weight:
    """`weight` [out_features, in_features] in e4m3 with a scale a row: 3.6 times closer to it than NF4 is."""
    out_features, in_features = weight.shape
    rows = empty_fp8_rows(out_features, in_features, weight.device, pieces=False)
    quantise_reference(weight, rows)
    return Fp8Weight(rows.codes.contiguous(), rows.scale)


def fp8_reference(weight: Fp8Weight) -> torch.Tensor:
    """The weight in fp32 [out_features, in_features]."""
    if not weight.has_blocks:
        return weight.codes.float() * weight.scale[:, None]
    rows, columns = weight.shape
    scale = weight.scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.codes.float() * scale
