"""Linear layers with LoRA adapters over weights in e4m3: products on the fp8 units, the adapters in the same sum.

    y  = (x in e4m3 · codesᵀ) · scales  +  (x·Aᵀ)·(s·B)ᵀ  +  bias
    dX = (dy · W's scales, in e4m3) · codes  +  (dy·s·B)·A

Each is accumulated in fp32 and rounded once (ops/fp8_product.py): an adapter that is added into an output which is
already rounded loses most of what it contributes while it is small. What the adapters read stays in 16 bit, and their
gradients are those of any group.

A scale a row of W is one of a summand in dX, and so is folded into dy before its rows are quantised; the scales of
blocks of 128 x 128 are not, and the products of both directions then go by 128 columns. dX wants the codes transposed:
they are turned anew for each call.

    input      XE  = [x | x·A₁ᵀ | x·A₂ᵀ | ...]                    [T, input_width]
    gradient   DYE = [dy₁ | dy₂ | ... | dy₁·s·B₁ | dy₂·s·B₂ ...]    [T, gradient_width]

The only adapter of a single projection is read where it is, where it can be: then s is in x·Aᵀ and dy·B, not in B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

from steep.ops.backend import uses_kernels
from steep.ops.fp8 import BLOCK, E4M3, Fp8Rows, Fp8Weight, empty_fp8_rows
from steep.ops.fp8_product import LowPart, fp8_product
from steep.ops.lora import AdapterGroup, Projection
from steep.ops.lora_fill import LoraFill
from steep.ops.lora_layout import ALIGNMENT, beside_layout_of
from steep.ops.lora_linear import linears
from steep.ops.products import product
from steep.ops.slices import columns_of, rows_of


class Fp8Buffer(NamedTuple):
    """s·B [N, widest rank], each projection's at its left, and A [sum of ranks, K], as products read them; or B and A
    of the only adapter, where it is read in place."""

    b: torch.Tensor
    a: torch.Tensor


class Fp8Group(AdapterGroup):
    """A `Group`: projections that read the same input, over weights in e4m3 with the same kind of scale.

    Attributes:
        outputs: N, the features of all outputs.
        input_width, x_columns: of the input rows, and where x stands in them.
        gradient_width: of the gradient rows; dy stands in their first N columns.
        buffer_bytes: of a filled buffer; an adapter that is read in place takes none.
        transposed_bytes: of the transposed codes.
    """

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype) -> None:
        weights = [projection.weight for projection in projections]
        assert (reason := why_not_fp8(weights, dtype)) is None, reason
        self._layout = layout = beside_layout_of(tuple([projection.member() for projection in projections]))
        super().__init__(projections, dtype, layout.places, layout.x_columns)
        self._weights: list[Fp8Weight] = [weight for weight in weights if isinstance(weight, Fp8Weight)]
        self._in_place = self._read_in_place()
        self._scale_of_low = 1.0  # of x·Aᵀ and dy·B as they are written
        if self._in_place is not None:
            self._scale_of_low, self._scales = self._scales[0], [1.0]
        self._has_blocks = self._weights[0].has_blocks
        self.outputs = layout.outputs
        self.input_width = layout.input_width
        self.gradient_width = layout.gradient_width
        # Rows of the transposed codes begin at multiples of 16 bytes.
        self._transposed_shape = layout.a_shape[1], -(-layout.outputs // 16) * 16
        sizes = [rows * columns for rows, columns in (layout.b_shape, layout.a_shape)]
        self.buffer_bytes = sum(sizes) * dtype.itemsize
        self.transposed_bytes = self._transposed_shape[0] * self._transposed_shape[1]

    def _read_in_place(self) -> Fp8Buffer | None:
        """The only adapter, if products can read it as it is."""
        if len(self.projections) > 1 or len(self._adapters) != 1:
            return None
        buffer = Fp8Buffer(self._adapters[0].b.detach(), self._adapters[0].a.detach())
        fits = all(part.dtype == self.dtype and part.is_contiguous() and part.data_ptr() % 16 == 0 for part in buffer)
        return buffer if fits and buffer.b.shape[1] % ALIGNMENT == 0 else None

    @cached_property
    def _runs(self) -> list[_Run]:
        layout = self._layout
        lows = [
            LowPart(rows.start, rows.stop, low.start, low.stop - low.start)
            for rows, low in zip(layout.rows, layout.lows, strict=True)
        ]
        return _runs(self._weights, lows)

    @cached_property
    def _scale_in_place(self) -> torch.Tensor | None:
        return as_one([weight.scale for weight in self._weights])

    def _scale(self) -> torch.Tensor:
        """Of all weights, one below the other. A copy is not kept: scales may be written over, as by a checkpoint."""
        in_place = self._scale_in_place
        return torch.cat([weight.scale for weight in self._weights]) if in_place is None else in_place

    def _scale_of_transposed(self) -> torch.Tensor | None:
        """That of a scale a row is in dy already."""
        return self._scale().t().contiguous() if self._has_blocks else None

    def _bias(self) -> torch.Tensor | None:
        """Of all outputs, in fp32; no copy is kept either."""
        biases = [projection.bias for projection in self.projections]
        if all(bias is None for bias in biases):
            return None
        parts = zip(biases, self._weights, strict=True)
        rows = [weight.scale.new_zeros(weight.shape[0]) if bias is None else bias for bias, weight in parts]
        return torch.cat(rows).float()

    @cached_property
    def _fills(self) -> tuple[LoraFill, LoraFill]:
        matrices = [tensor for adapter in self._adapters for tensor in (adapter.a, adapter.b)]
        scales = [scale for adapter in self._adapters for scale in (1.0, adapter.scale)]
        layout = self._layout
        return LoraFill(layout.b, matrices, scales, ()), LoraFill(layout.a, matrices, scales, ())

    def filled_buffer(self, device: torch.device) -> Fp8Buffer:
        """s·B (multiplied in fp32, rounded once) and A."""
        if self._in_place is not None:
            return self._in_place
        shapes = self._layout.b_shape, self._layout.a_shape
        buffer = Fp8Buffer(*[torch.empty(shape, dtype=self.dtype, device=device) for shape in shapes])
        if self._adapters:
            for fill, part in zip(self._fills, buffer, strict=True):
                fill.write(part)
        return buffer

    def quantised_input(self, tokens: int, device: torch.device) -> Fp8Rows:
        """Where x belongs in e4m3, still empty."""
        return empty_fp8_rows(tokens, self._layout.a_shape[1], device, pieces=self._has_blocks)

    def quantised_gradient(self, tokens: int, device: torch.device) -> Fp8Rows:
        """Where dy belongs in e4m3, still empty."""
        factors = None if self._has_blocks else self._scale()
        return empty_fp8_rows(tokens, self.outputs, device, pieces=self._has_blocks, factors=factors)

    def extend_input(self, xe: torch.Tensor, buffer: Fp8Buffer) -> None:
        """Write the columns of `xe` [T, input_width] beside x: x·Aᵀ."""
        if self._adapters:
            low = xe[:, self._layout.lows[0].start :]
            product(xe[:, self.x_columns], buffer.a.t(), out=low, scale=self._scale_of_low)

    def forward(
        self,
        xe: torch.Tensor,
        buffer: Fp8Buffer,
        out: torch.Tensor,
        add: torch.Tensor | None = None,
        quantised: Fp8Rows | None = None,
    ) -> None:
        """Write the outputs of all projections into `out` [T, N], + `add` [T, N] before the one rounding.

        Args:
            add: of out's dtype, any of 16 or 32 bit; may be `out`.
            quantised: x in e4m3, where `quantised_input` said.
        """
        assert quantised is not None, "x in e4m3 is read here"
        scale, bias = self._scale(), self._bias()
        for run in self._runs:
            rows = run.rows
            fp8_product(
                quantised,
                run.codes,
                rows_of(scale, run.scales),
                columns_of(out, rows),
                low=xe,
                b=rows_of(buffer.b, rows),
                parts=run.parts,
                bias=None if bias is None else rows_of(bias, rows),
                add=None if add is None else columns_of(add, rows),
            )

    def extend_gradient(self, dye: torch.Tensor, buffer: Fp8Buffer) -> None:
        """Write the columns of `dye` [T, gradient_width] beside dy: dy·s·B."""
        for rows, low_rows in zip(self._layout.rows, self._layout.low_rows, strict=True):
            width = low_rows.stop - low_rows.start
            if width:
                b = columns_of(rows_of(buffer.b, rows), slice(0, width))
                product(dye[:, rows], b, out=dye[:, low_rows], scale=self._scale_of_low)

    def input_gradient(
        self,
        dye: torch.Tensor,
        buffer: Fp8Buffer,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        quantised: Fp8Rows | None = None,
    ) -> torch.Tensor:
        """dX [T, in_features], in `out` if given.

        Args:
            quantised: dy in e4m3, where `quantised_gradient` said.
        """
        assert quantised is not None, "dy in e4m3 is read here"
        ranks, in_features = self._layout.a_shape
        if out is None:
            out = torch.empty(dye.shape[0], in_features, dtype=out_dtype or self.dtype, device=dye.device)
        start = self._layout.low_rows[0].start
        fp8_product(
            quantised,
            self._transposed(),
            self._scale_of_transposed(),
            out,
            low=dye,
            b=buffer.a.t(),
            parts=[LowPart(0, in_features, start, ranks)],
        )
        return out

    def _transposed(self) -> torch.Tensor:
        """The codes of all weights, [in_features, N]."""
        codes = torch.empty(self._transposed_shape, dtype=E4M3, device=self._weights[0].codes.device)
        codes = columns_of(codes, slice(0, self.outputs))
        for run in self._runs:
            transpose(run.codes, columns_of(codes, run.rows))
        return codes


@dataclass(frozen=True)
class _Run:
    """Neighbours of a group whose codes lie one behind the other, as one weight.

    Attributes:
        codes: e4m3 [rows of all, in_features].
        rows: of the group's outputs.
        scales: rows of the group's scales.
        parts: where the adapters of each stand, counted from the first of `rows`.
    """

    codes: torch.Tensor
    rows: slice
    scales: slice
    parts: list[LowPart]


def _runs(weights: Sequence[Fp8Weight], lows: Sequence[LowPart]) -> list[_Run]:
    """
    Args:
        lows: where the adapters of each stand, counted from the group's first row.
    """
    neighbours = enumerate(pairwise([weight.codes for weight in weights]), 1)
    first = [0, *(at for at, pair in neighbours if as_one(pair) is None)]
    runs: list[_Run] = []
    rows = scales = 0
    for start, stop in pairwise([*first, len(weights)]):
        height = sum(weight.shape[0] for weight in weights[start:stop])
        num_scales = sum(weight.scale.shape[0] for weight in weights[start:stop])
        whole = as_one([weight.codes for weight in weights[start:stop]])
        assert whole is not None
        parts = [low._replace(start=low.start - rows, stop=low.stop - rows) for low in lows[start:stop]]
        runs.append(_Run(whole, slice(rows, rows + height), slice(scales, scales + num_scales), parts))
        rows, scales = rows + height, scales + num_scales
    return runs


def as_one(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Contiguous tensors of the same columns from top to bottom as one, by reference, where each begins where the one
    before ends; else None."""
    first = parts[0]
    for one, other in pairwise(parts):
        same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        if not same or other.storage_offset() != one.storage_offset() + one.numel():
            return None
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def transpose(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Write e4m3 `codes` [N, K] into `out` [K, N], whose rows may be apart."""
    assert out.shape == codes.t().shape and out.stride(1) == codes.stride(1) == 1, (codes.shape, out.shape)
    if not uses_kernels(out):
        out.copy_(codes.t())
        return
    from steep.kernels import fp8_weight

    fp8_weight.transpose(codes, out)


def why_not_fp8(weights: Sequence[object], dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why there are no fp8 products over these weights, one below the other, beside adapters in `dtype`; None: there
    are. All have to be in e4m3 with the same kind of scale, their rows at multiples of 16 bytes, and no block may run
    across weights.

    Args:
        head_dim: of q, k and v, whose dy is quantised head by head: no block may run across heads either, unless it has
            whole ones.
    """
    stored = [weight for weight in weights if isinstance(weight, Fp8Weight)]
    if not stored:
        return "no weight is in e4m3"
    if len(stored) < len(weights):
        return "not all weights are in e4m3"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"products are in {str(dtype).removeprefix('torch.')}"
    if any(weight.shape[1] % 16 for weight in stored):
        return f"rows of {stored[0].shape[1]} weights are no multiple of 16"
    if any(weight.has_blocks != stored[0].has_blocks for weight in stored):
        return "some scales are of rows, others of blocks"
    if not stored[0].has_blocks:
        return None
    if ragged := [weight.shape[0] for weight in stored[:-1] if weight.shape[0] % BLOCK]:
        return f"blocks of {BLOCK} x {BLOCK} run across weights of {ragged[0]} rows"
    if head_dim is not None and head_dim % BLOCK and BLOCK % head_dim:
        return f"blocks of {BLOCK} x {BLOCK} run across heads of {head_dim}"
    return None


def fp8_linear(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """[T, in_features] -> [T, out_features], in x's dtype, bf16 or fp16. Differentiable in x and in the adapters that
    train. Saved for the backward pass: x and the adapters."""
    return fp8_linears(x, (projection,))


def fp8_linears(x: torch.Tensor, projections: Sequence[Projection]) -> torch.Tensor:
    """[T, in_features] -> [T, sum of out_features]: projections that read the same x, as one group."""
    return linears(x, Fp8Group(projections, x.dtype))
