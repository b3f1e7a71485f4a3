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
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch

from steep.ops.backend import gradient_dtype
from steep.ops.base_weight import BaseWeight
from steep.ops.fp8 import Fp8Rows
from steep.ops.lora_fill import LoraFill
from steep.ops.lora_layout import ALIGNMENT, Member, Place, layout_of
from steep.ops.nf4 import stacked
from steep.ops.products import product
from steep.ops.slices import rows_of


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

    def member(self) -> Member:
        """Its shapes."""
        adapters = tuple([(adapter.a.shape, adapter.b.shape) for adapter in self.adapters])
        return Member(self.weight.shape, self.bias is not None, adapters)


class Group(Protocol):
    """Projections that read the same input, as one product or few. Who calls it owns all buffers.

    Forward: write x into ``xe[:, x_columns]``, and in e4m3 into `quantised_input` where there is one; then
    `filled_buffer`, `extend_input`, `forward`. Backward: write dy into ``dye[:, :outputs]``, and into
    `quantised_gradient` where there is one; then `filled_buffer` (of the same contents as the forward's),
    `extend_gradient`, `input_gradient`; `adapter_gradients` needs `xe` too. All buffers may hold anything before (also
    NaN), and their rows may be apart.
    """

    projections: tuple[Projection, ...]
    dtype: torch.dtype
    outputs: int
    input_width: int
    x_columns: slice
    gradient_width: int
    buffer_bytes: int
    transposed_bytes: int

    def filled_buffer(self, device: torch.device) -> Any: ...

    def quantised_input(self, tokens: int, device: torch.device) -> Fp8Rows | None: ...

    def quantised_gradient(self, tokens: int, device: torch.device) -> Fp8Rows | None: ...

    def forward_bytes(self, tokens: int) -> int: ...

    def extend_input(self, xe: torch.Tensor, buffer: Any) -> None: ...

    def forward(
        self,
        xe: torch.Tensor,
        buffer: Any,
        out: torch.Tensor,
        add: torch.Tensor | None = None,
        quantised: Fp8Rows | None = None,
    ) -> None: ...

    def extend_gradient(self, dye: torch.Tensor, buffer: Any) -> None: ...

    def input_gradient(
        self,
        dye: torch.Tensor,
        buffer: Any,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        quantised: Fp8Rows | None = None,
    ) -> torch.Tensor: ...

    def adapter_gradients(
        self, dye: torch.Tensor, xe: torch.Tensor, out_dtype: torch.dtype | None = None
    ) -> list[torch.Tensor | None]: ...

    def gradient_products(self) -> list[GradientProduct]: ...

    def gradients_of(
        self, products: Sequence[GradientProduct], made: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]: ...


@dataclass(frozen=True)
class GradientProduct:
    """Gradients of adapters that are one product, of columns of the gradient rows and columns of the input rows.

    Attributes:
        dye, xe: the columns.
        shape: of the product.
        dtype: what autograd keeps of the gradients.
        scale: of the product.
        members: among all gradients of a group the number of each that is made, and its rows of the product.
    """

    dye: slice
    xe: slice
    shape: tuple[int, int]
    dtype: torch.dtype
    scale: float
    members: list[tuple[int, slice]]

    def made(self, dye: torch.Tensor, xe: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """In `dtype`, of the rows of all tokens."""
        return product(dye[:, self.dye].t(), xe[:, self.xe], out_dtype=dtype, scale=self.scale)

    def write(self, dye: torch.Tensor, xe: torch.Tensor, out: torch.Tensor, *, adds: bool) -> None:
        """Into `out`, in fp32, of the rows of some tokens. adds: to what is there."""
        add = out if adds else None
        product(dye[:, self.dye].t(), xe[:, self.xe], add=add, out=out, scale=self.scale)


class AdapterGroup:
    """Projections that read the same input, and the gradients of their adapters.

    Attributes:
        x_columns: where x stands in the input rows.
    """

    def __init__(
        self, projections: Sequence[Projection], dtype: torch.dtype, places: Sequence[Place], x_columns: slice
    ) -> None:
        self.projections = tuple(projections)
        self.dtype = dtype
        self.x_columns = x_columns
        self._adapters = [adapter for projection in projections for adapter in projection.adapters]
        self._places = places
        self._scales = [adapter.scale for adapter in self._adapters]  # of x·Aᵀ where it is read for dB
        self._products: dict[tuple[torch.dtype | None, ...], list[GradientProduct]] = {}  # by what trains, and in what

    def forward_bytes(self, tokens: int) -> int:
        """Bytes that `forward` of [T, any] takes at its peak beside what it is handed: none."""
        return 0

    def adapter_gradients(
        self, dye: torch.Tensor, xe: torch.Tensor, out_dtype: torch.dtype | None = None
    ) -> list[torch.Tensor | None]:
        """Gradients of each adapter's a and b, in the order of ``Projection.tensors()`` of all projections; None, and
        nothing is computed, where a tensor does not require one.

        Each is contiguous, in `out_dtype` or else in what autograd keeps of it (`gradient_dtype`), straight from the
        fp32 accumulation where the dtype is fp32 or that of the group. Those of a are rows of one tensor.
        """
        products = self.gradient_products()
        return self.gradients_of(products, [each.made(dye, xe, out_dtype or each.dtype) for each in products])

    def gradient_products(self) -> list[GradientProduct]:
        """Those of the adapters that train now."""
        trains = tuple([_kept_as(tensor) for adapter in self._adapters for tensor in (adapter.a, adapter.b)])
        if trains not in self._products:
            self._products[trains] = self._worked_out(trains)
        return self._products[trains]

    def _worked_out(self, trains: Sequence[torch.dtype | None]) -> list[GradientProduct]:
        found: list[GradientProduct] = []
        runs: list[list[int]] = []  # of neighbours: one product each; what pads them is computed with them
        for index, place in enumerate(self._places):
            of_a, of_b = trains[2 * index], trains[2 * index + 1]
            if of_b is not None:
                height = place.outputs.stop - place.outputs.start
                shape, member = (height, place.low.stop - place.low.start), (2 * index + 1, slice(0, height))
                found.append(GradientProduct(place.outputs, place.low, shape, of_b, self._scales[index], [member]))
            if of_a is None:
                continue
            before = runs[-1][-1] if runs else None
            if (
                before is not None
                and place.low_rows.start - self._places[before].low_rows.stop < ALIGNMENT
                and of_a == trains[2 * before]
            ):
                runs[-1].append(index)
            else:
                runs.append([index])
        for run in runs:
            rows = [self._places[index].low_rows for index in run]
            start, stop = rows[0].start, rows[-1].stop
            members = [
                (2 * index, slice(own.start - start, own.stop - start)) for index, own in zip(run, rows, strict=True)
            ]
            shape, dtype = (stop - start, self._adapters[run[0]].a.shape[1]), trains[2 * run[0]]
            assert dtype is not None
            found.append(GradientProduct(slice(start, stop), self.x_columns, shape, dtype, 1.0, members))
        return found

    def gradients_of(
        self, products: Sequence[GradientProduct], made: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """As `adapter_gradients` gives them, from what each product made."""
        gradients: list[torch.Tensor | None] = [None] * (2 * len(self._adapters))
        for each, whole in zip(products, made, strict=True):
            for number, rows in each.members:
                gradients[number] = rows_of(whole, rows)
        return gradients


def _kept_as(tensor: torch.Tensor) -> torch.dtype | None:
    """What autograd keeps of its gradient; None: it does not train."""
    return gradient_dtype(tensor) if tensor.requires_grad else None


class LoraGroup(AdapterGroup):
    """A `Group`: projections that read the same input, the first of which should be the largest.

    Attributes:
        outputs: N, the features of all outputs.
        buffer_shape: of the weight buffer, in `dtype`.
        input_width, x_columns: of the input rows, and where x stands in them.
        gradient_width: of the gradient rows; dy stands in their first N columns.
        buffer_bytes: of the weight buffer.
        transposed_bytes: of a transposed weight; there is none, since products read the buffer both ways.
    """

    transposed_bytes = 0

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype) -> None:
        self._layout = layout = layout_of(tuple([projection.member() for projection in projections]))
        super().__init__(projections, dtype, layout.places, layout.x_columns)
        self.outputs = layout.outputs
        self.gradient_width = layout.gradient_width
        self.input_width = layout.input_width
        self.buffer_shape = (layout.gradient_width, layout.input_width)
        self.buffer_bytes = layout.gradient_width * layout.input_width * dtype.itemsize
        self._with_low = [part for part in layout.parts if not _is_empty(part.low)]
        self._has_bias = any(projection.bias is not None for projection in projections)

    def fill(self, buffer: torch.Tensor) -> None:
        """Write W, s·B (multiplied in fp32, rounded once), A and the zeros into `buffer`, of `buffer_shape`."""
        assert buffer.shape == self.buffer_shape and buffer.dtype == self.dtype, (buffer.shape, buffer.dtype)
        for weight, rows in self._weights:
            weight.write(buffer[rows, self.x_columns])
        self._beside.write(buffer)

    @cached_property
    def _weights(self) -> list[tuple[BaseWeight, slice]]:
        """What stands in the column of W, and its rows."""
        weights = stacked([projection.weight for projection in self.projections])
        ends = accumulate((weight.shape[0] for weight in weights), initial=0)
        return [(weight, slice(*rows)) for weight, rows in zip(weights, pairwise(ends), strict=True)]

    @cached_property
    def _beside(self) -> LoraFill:
        """What stands beside it."""
        matrices = [tensor for adapter in self._adapters for tensor in (adapter.a, adapter.b)]
        scales = [scale for adapter in self._adapters for scale in (1.0, adapter.scale)]
        return LoraFill(self._layout, matrices, scales, [projection.bias for projection in self.projections])

    def filled_buffer(self, device: torch.device) -> torch.Tensor:
        """A new weight buffer, filled."""
        buffer = torch.empty(self.buffer_shape, dtype=self.dtype, device=device)
        self.fill(buffer)
        return buffer

    def quantised_input(self, tokens: int, device: torch.device) -> None:
        """Where x belongs in e4m3: nowhere, as products read it in `dtype`."""

    def quantised_gradient(self, tokens: int, device: torch.device) -> None:
        """Where dy belongs in e4m3: nowhere."""

    def extend_input(self, xe: torch.Tensor, buffer: torch.Tensor) -> None:
        """Write the columns of `xe` [T, input_width] beside x: x·Aᵀ, and what bias meets."""
        padding = self._layout.padding
        if not _is_empty(padding):
            xe[:, padding].zero_()
        if self._has_bias:
            xe[:, padding.start].fill_(1.0)
        x = xe[:, self.x_columns]
        for part in self._with_low:
            product(x, _turned(buffer, part.low_rows, self.x_columns), out=xe[:, part.low])

    def forward(
        self,
        xe: torch.Tensor,
        buffer: torch.Tensor,
        out: torch.Tensor,
        add: torch.Tensor | None = None,
        quantised: Fp8Rows | None = None,
    ) -> None:
        """Write the outputs of all projections into `out` [T, N], + `add` [T, N] before the one rounding.

        `out` and `add` are of one dtype, `dtype` or fp32; they may be the same tensor. `quantised` is
        not read.
        """
        parts = self._layout.parts
        if len(parts) == 1:
            product(xe[:, parts[0].inputs], _turned(buffer, parts[0].outputs, parts[0].inputs), add=add, out=out)
            return
        for part in parts:
            product(
                xe[:, part.inputs],
                _turned(buffer, part.outputs, part.inputs),
                add=None if add is None else add[:, part.outputs],
                out=out[:, part.outputs],
            )

    def extend_gradient(self, dye: torch.Tensor, buffer: torch.Tensor) -> None:
        """Write the columns of `dye` [T, gradient_width] beside dy: dy·s·B."""
        start = self._layout.parts[0].low_rows.start
        if self.outputs < start:
            dye[:, self.outputs : start].zero_()
        for part in self._with_low:
            product(dye[:, part.outputs], buffer[part.outputs, part.low], out=dye[:, part.low_rows])

    def input_gradient(
        self,
        dye: torch.Tensor,
        buffer: torch.Tensor,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        quantised: Fp8Rows | None = None,
    ) -> torch.Tensor:
        """dX [T, in_features], in `out` if given. `quantised` is not read."""
        return product(dye, buffer[:, self.x_columns], out=out, out_dtype=out_dtype)


def _turned(buffer: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """buffer[rows, columns].t(), in one step: the host makes many of them."""
    stride = buffer.stride(0)
    return buffer.as_strided(
        (columns.stop - columns.start, rows.stop - rows.start),
        (1, stride),
        buffer.storage_offset() + rows.start * stride + columns.start,
    )


def _is_empty(part: slice) -> bool:
    return part.start == part.stop
