"""Linear layers with LoRA adapters as single products, by merging: y = x·(W + s·B·A)ᵀ, the sum rounded once.

What extending K (`steep.ops.lora`) costs grows with the tokens, at every product with W; merging costs the same however
many there are: the better way for long batches. In the buffers of a group W + s·B·A stands in the place of W. The
gradients of the adapters are what they are there, from the same columns.

The sum is rounded to 16 bit like every weight that a product reads: what a small adapter adds to an element is kept on
average, as noise around the right value, wherever W lies between two numbers of 16 bit. NF4's does, but for one element
in thirty: the largest of its block, which was such a number before it was quantised, and is near to one again. A small
adapter so reaches the output at 99 % (tests/ops/test_lora_gain.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steep.ops.lora import LoraGroup, Projection, turned
from steep.ops.merge import merge_write, merges_fast, merges_whole
from steep.ops.products import product

# Products with low-rank factors run at two thirds of a large product's rate, and the merge kernel at half of it.
_RELATIVE_COST = 3.6


class MergedGroup(LoraGroup):
    """A `LoraGroup` that multiplies by W + s·B·A. Its weights are such as `merge_write` takes."""

    forward_extends = False

    def fill(self, buffer: torch.Tensor) -> None:
        """As that of `LoraGroup`, with W + s·B·A in the place of W."""
        assert buffer.shape == self.buffer_shape and buffer.dtype == self.dtype, (buffer.shape, buffer.dtype)
        self._beside.write(buffer)
        layout = self._layout
        for projection, rows, low, low_rows in zip(
            self.projections, layout.rows, layout.lows, layout.low_rows, strict=True
        ):
            weight, out = projection.weight, buffer[rows, self.x_columns]
            if projection.adapters:
                merge_write(weight, buffer[rows, low], buffer[low_rows, self.x_columns], out)
            else:
                weight.write(out)

    def extend_input(self, xe: torch.Tensor, buffer: torch.Tensor, *, gradients: bool = True) -> None:
        if gradients:
            super().extend_input(xe, buffer)
        else:
            self._extend_by_padding(xe)

    def forward(
        self, xe: torch.Tensor, buffer: torch.Tensor, out: torch.Tensor, add: torch.Tensor | None = None
    ) -> None:
        columns = slice(self.x_columns.start, self._layout.padding.stop)
        product(xe[:, columns], turned(buffer, slice(0, self.outputs), columns), add=add, out=out)

    def input_gradient(
        self,
        dye: torch.Tensor,
        buffer: torch.Tensor,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        dy, weight = dye[:, : self.outputs], buffer[: self.outputs, self.x_columns]
        return product(dy, weight, out=out, out_dtype=out_dtype)


def merges_from(projections: Sequence[Projection], dtype: torch.dtype) -> int:
    """From how many tokens on merging is the faster way for these projections together, by their sizes; 0: at none,
    since there is no adapter, or a weight that no kernel merges, or not as it should (`merges_whole`).

    The rank has no part in it, while products with low-rank factors are bound by FLOPs: from a rank of 64 or so.
    """
    adapted = [projection.weight for projection in projections if projection.adapters]
    if not adapted or not all(merges_fast(weight) and merges_whole(weight, dtype) for weight in adapted):
        return 0
    merged = sum(rows * columns for rows, columns in (weight.shape for weight in adapted))
    # Of a token: x·Aᵀ, its product with B, and in the backward pass that of dy·B with A.
    extended = sum(rows + 2 * columns for rows, columns in (weight.shape for weight in adapted))
    return round(_RELATIVE_COST * merged / extended)
