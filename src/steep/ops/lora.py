"""Linear layers with LoRA adapters as single products, by extending K: y = [xA₁ᵀ, x]·[s·B₁, W₁]ᵀ.

Added into an output that is already rounded to bf16, most of a small adapter's contribution is lost (the gain test in
tests/ops/test_lora_gain.py shows how much). Here the adapter's product stands in the same sum as the base's, which
accumulates in fp32 and rounds once; and it costs no pass over y, nor over dX in the backward pass.

Projections that read the same input (q, k, v; gate, up; o or down alone) are one group. Its rows, of T tokens:

    input      XE  = [x·A₁ᵀ | x | 1 | x·A₂ᵀ | x·A₃ᵀ]                              [T, input_width]
    gradient   DYE = [dy₁ | dy₂ | dy₃ | dy₁·s·B₁ | dy₂·s·B₂ | dy₃·s·B₃]           [T, gradient_width]

and one weight buffer serves both directions (a dot: never read):

    [ s·B₁ | W₁ | bias₁ |   .  |   .  ]     y₁       = XE[:, up to the bias] · (these rows)ᵀ
    [   .  | W₂ | bias₂ | s·B₂ |   0  ]     [y₂, y₃] = XE[:, from x on] · (these rows)ᵀ
    [   .  | W₃ | bias₃ |   0  | s·B₃ ]
    [   .  | A₁ |   .   |   .  |   .  ]     dX = DYE · (the column of W and A)
    [   .  | A₂ |   .   |   .  |   .  ]
    [   .  | A₃ |   .   |   .  |   .  ]

So x stands once, the large products are two a group at most, and only the smaller projections pay for the zeros: the
first should be the largest. The gradients of the adapters read the same rows:

    dBᵢ = s·dyᵢᵀ·(x·Aᵢᵀ)        dA = (dy·s·B)ᵀ·x, of all projections at once

Every block of columns begins at a multiple of eight elements (16 bytes in 16 bit); what pads it is zero on both sides.
The column of ones that bias meets is one of these, and only there where a projection has a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steep.ops.base_weight import BaseWeight
from steep.ops.products import product

ALIGNMENT = 8  # elements


@dataclass(frozen=True)
class Lora:
    """One active adapter of one projection: W + scale * b @ a. It trains where its tensors require a gradient.

    Attributes:
        a: [rank, in_features].
        b: [out_features, rank].
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Projection:
    """One linear layer: a frozen weight, a frozen bias [out_features] or None, and any number of active adapters."""

    weight: BaseWeight
    bias: torch.Tensor | None = None
    adapters: tuple[Lora, ...] = ()

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """a and b of each adapter, in the order in which gradients are given."""
        return tuple(tensor for adapter in self.adapters for tensor in (adapter.a, adapter.b))


@dataclass(frozen=True)
class _Part:
    """Projections whose outputs one product gives.

    Attributes:
        outputs: rows of the buffer, and columns of y and dy.
        inputs: columns of the input rows and of the buffer which that product reads.
        low: columns of x·Aᵀ in the input rows, and of s·B in the buffer.
        low_rows: rows of A in the buffer, and columns of dy·s·B in the gradient rows.
    """

    outputs: slice
    inputs: slice
    low: slice
    low_rows: slice


@dataclass(frozen=True)
class _Place:
    """Where an adapter stands: its slices as in `_Part`, with no padding."""

    lora: Lora
    outputs: slice
    low: slice
    low_rows: slice


class LoraGroup:
    """Projections that read the same input, the first of which should be the largest.

    The caller owns all buffers. Forward: write x into ``xe[:, x_columns]``, then `fill`, `extend_input`, `forward`.
    Backward: write dy into ``dye[:, :outputs]``, then `fill` (the same buffer as the forward's), `extend_gradient`,
    `input_gradient`; `adapter_gradients` needs `xe` too. All buffers may hold anything before (also NaN), and their
    rows may be apart.

    Attributes:
        outputs: N, the features of all outputs.
        buffer_shape: of the weight buffer, in `dtype`.
        input_width, x_columns: of the input rows, and where x stands in them.
        gradient_width: of the gradient rows; dy stands in their first N columns.
    """

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype) -> None:
        self.projections = tuple(projections)
        self.dtype = dtype
        in_features = {projection.weight.shape[1] for projection in projections}
        assert len(in_features) == 1, f"projections of one group read the same input: {in_features}"
        (in_features,) = in_features
        self._has_bias = any(projection.bias is not None for projection in projections)
        widths = [_aligned(sum(len(adapter.a) for adapter in projection.adapters)) for projection in projections]

        self.outputs = sum(projection.weight.shape[0] for projection in projections)
        self._low_start = _aligned(self.outputs)
        self.gradient_width = self._low_start + sum(widths)
        self.x_columns = slice(widths[0], widths[0] + in_features)
        self._padding = slice(self.x_columns.stop, widths[0] + _aligned(in_features + self._has_bias))
        self.input_width = self._padding.stop + sum(widths[1:])
        self.buffer_shape = (self.gradient_width, self.input_width)

        self._parts: list[_Part] = []
        self._outputs: list[slice] = []  # of each projection
        self._places: list[_Place] = []
        self._zeros = [  # blocks of the buffer (rows, columns) that no tensor fills
            (slice(0, self.outputs), self._padding),
            (slice(self.outputs, self._low_start), self.x_columns),
        ]
        self._add_part(self.projections[:1], column=0)
        if len(self.projections) > 1:
            self._add_part(self.projections[1:], column=self._padding.stop)
        self._zeros = [block for block in self._zeros if not (_is_empty(block[0]) or _is_empty(block[1]))]

    def _add_part(self, members: Sequence[Projection], column: int) -> None:
        """Lay out projections that share a product, their s·B from `column` on, their outputs below those before."""
        row, low_row = 0, self._low_start
        if self._parts:
            row, low_row = self._parts[-1].outputs.stop, self._parts[-1].low_rows.stop
        starts, has_zeros = (row, column, low_row), len(members) > 1
        for projection in members:
            outputs = slice(row, row + projection.weight.shape[0])
            end, low_end = column, low_row
            for adapter in projection.adapters:
                rank = adapter.a.shape[0]
                assert adapter.a.shape[1] == projection.weight.shape[1], (adapter.a.shape, projection.weight.shape)
                assert adapter.b.shape == (projection.weight.shape[0], rank), (adapter.b.shape, projection.weight.shape)
                place = _Place(adapter, outputs, slice(end, end + rank), slice(low_end, low_end + rank))
                self._places.append(place)
                end, low_end = end + rank, low_end + rank
            self._outputs.append(outputs)
            width = _aligned(end - column)
            row, column, low_row = outputs.stop, column + width, low_row + width
            has_zeros |= low_end < low_row
            self._zeros.append((slice(low_end, low_row), self.x_columns))
        outputs, low, low_rows = (slice(*ends) for ends in zip(starts, (row, column, low_row), strict=True))
        if has_zeros:
            self._zeros.append((outputs, low))
        inputs = slice(self.x_columns.start, column) if self._parts else slice(0, self._padding.stop)
        self._parts.append(_Part(outputs, inputs, low, low_rows))

    def fill(self, buffer: torch.Tensor) -> None:
        """Write W, s·B (multiplied in fp32, rounded once), A and the zeros into `buffer`, of `buffer_shape`."""
        assert buffer.shape == self.buffer_shape and buffer.dtype == self.dtype, (buffer.shape, buffer.dtype)
        for rows, columns in self._zeros:
            buffer[rows, columns].zero_()
        for projection, outputs in zip(self.projections, self._outputs, strict=True):
            projection.weight.write(buffer[outputs, self.x_columns])
            if projection.bias is not None:
                buffer[outputs, self._padding.start].copy_(projection.bias)
        for place in self._places:
            b = place.lora.b.detach()
            b = b if b.dtype == self.dtype else b.float()
            torch.mul(b, place.lora.scale, out=buffer[place.outputs, place.low])
            buffer[place.low_rows, self.x_columns].copy_(place.lora.a.detach())

    def filled_buffer(self, device: torch.device) -> torch.Tensor:
        """A new weight buffer, filled."""
        buffer = torch.empty(self.buffer_shape, dtype=self.dtype, device=device)
        self.fill(buffer)
        return buffer

    def extend_input(self, xe: torch.Tensor, buffer: torch.Tensor) -> None:
        """Write the columns of `xe` [T, input_width] beside x: x·Aᵀ, and what bias meets."""
        if not _is_empty(self._padding):
            xe[:, self._padding].zero_()
        if self._has_bias:
            xe[:, self._padding.start].fill_(1.0)
        x = xe[:, self.x_columns]
        for part in self._parts:
            if not _is_empty(part.low):
                product(x, buffer[part.low_rows, self.x_columns].t(), out=xe[:, part.low])

    def forward(
        self, xe: torch.Tensor, buffer: torch.Tensor, out: torch.Tensor, add: torch.Tensor | None = None
    ) -> None:
        """Write the outputs of all projections into `out` [T, N], + `add` [T, N] before the one rounding.

        `out` and `add` are of one dtype, `dtype` or fp32; they may be the same tensor.
        """
        for part in self._parts:
            product(
                xe[:, part.inputs],
                buffer[part.outputs, part.inputs].t(),
                add=None if add is None else add[:, part.outputs],
                out=out[:, part.outputs],
            )

    def extend_gradient(self, dye: torch.Tensor, buffer: torch.Tensor) -> None:
        """Write the columns of `dye` [T, gradient_width] beside dy: dy·s·B."""
        if self.outputs < self._low_start:
            dye[:, self.outputs : self._low_start].zero_()
        for part in self._parts:
            if not _is_empty(part.low):
                product(dye[:, part.outputs], buffer[part.outputs, part.low], out=dye[:, part.low_rows])

    def input_gradient(
        self,
        dye: torch.Tensor,
        buffer: torch.Tensor,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """dX [T, in_features], in `out` if given."""
        return product(dye, buffer[:, self.x_columns], out=out, out_dtype=out_dtype)

    def adapter_gradients(
        self, dye: torch.Tensor, xe: torch.Tensor, out_dtype: torch.dtype | None = None
    ) -> list[torch.Tensor | None]:
        """Gradients of each adapter's a and b, in the order of ``Projection.tensors()`` of all projections; None, and
        nothing is computed, where a tensor does not require one.

        Each is contiguous, in `out_dtype` or else in its tensor's own dtype, straight from the fp32 accumulation where
        the dtype is fp32 or that of the group. Those of a are rows of one tensor.
        """
        places = self._places
        gradients: list[torch.Tensor | None] = [None] * (2 * len(places))
        runs: list[list[int]] = []  # of neighbours: one product each; what pads them is computed with them
        for index, place in enumerate(places):
            lora = place.lora
            if lora.b.requires_grad:
                dy_T = dye[:, place.outputs].t()
                gradients[2 * index + 1] = self._gradient(dy_T, xe[:, place.low], out_dtype or lora.b.dtype, lora.scale)
            if lora.a.requires_grad:
                before = places[runs[-1][-1]] if runs else None
                if (
                    before is not None
                    and place.low_rows.start - before.low_rows.stop < ALIGNMENT
                    and lora.a.dtype == before.lora.a.dtype
                ):
                    runs[-1].append(index)
                else:
                    runs.append([index])
        for run in runs:
            first, last = places[run[0]], places[run[-1]]
            rows = slice(first.low_rows.start, last.low_rows.stop)
            stacked = self._gradient(dye[:, rows].t(), xe[:, self.x_columns], out_dtype or first.lora.a.dtype)
            for index in run:
                low_rows = places[index].low_rows
                gradients[2 * index] = stacked[low_rows.start - rows.start : low_rows.stop - rows.start]
        return gradients

    def _gradient(self, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        # A product comes in its operands' dtype or in fp32.
        return product(a, b, out_dtype=dtype if dtype == self.dtype else torch.float32, scale=scale).to(dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _is_empty(part: slice) -> bool:
    return part.start == part.stop
