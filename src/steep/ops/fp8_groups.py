"""Which of the products over weights in e4m3 run on the fp8 units: the kind of group that computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from steep.ops.fp8 import Fp8Rows
from steep.ops.fp8_linear import Fp8Group, why_not_fp8
from steep.ops.lora import LoraGroup, Projection
from steep.ops.products import product

Fp8Products = Literal["both", "backward", "none"]
"""Both directions, dX alone, or neither: then weights are dequantised, as those of any other base."""
FP8_PRODUCTS: tuple[Fp8Products, ...] = get_args(Fp8Products)


class Fp8BackwardGroup(Fp8Group):
    """A `Group` whose forward products are in the group's dtype over dequantised weights: closer to the weights, and
    slower. They are summed in fp32 with the adapters', in a tensor of their own."""

    def quantised_input(self, tokens: int, device: torch.device) -> None:
        """Where x belongs in e4m3: nowhere."""

    def forward_bytes(self, tokens: int) -> int:
        """A weight in 16 bit, and its outputs in fp32."""
        shapes = (projection.weight.shape for projection in self.projections)
        return max(outputs * (columns * self.dtype.itemsize + 4 * tokens) for outputs, columns in shapes)

    def forward(
        self,
        xe: torch.Tensor,
        buffer: Any,
        out: torch.Tensor,
        add: torch.Tensor | None = None,
        quantised: Fp8Rows | None = None,
    ) -> None:
        """As that of `Fp8Group`. `quantised` is not read."""
        for rows, low, projection in zip(self._layout.rows, self._layout.lows, self.projections, strict=True):
            weight = torch.empty(projection.weight.shape, dtype=self.dtype, device=out.device)
            projection.weight.write(weight)
            y = product(xe[:, self.x_columns], weight.t(), out_dtype=torch.float32)
            del weight
            width = low.stop - low.start
            if width:
                product(xe[:, low], buffer.b[rows, :width].t(), add=y, out=y)
            if projection.bias is not None:
                y += projection.bias
            if add is not None:
                y += add[:, rows]
            out[:, rows] = y
            del y  # before the next one's weight


def group_of(
    projections: Sequence[Projection], dtype: torch.dtype, fp8: Fp8Products, head_dim: int | None = None
) -> LoraGroup | Fp8Group:
    """The group for products in `dtype`, and in fp8 as `fp8` says, where its weights are fit for that.

    Args:
        head_dim: of q, k and v, see `why_not_fp8`.

    Raises:
        ValueError: `fp8` is none of `FP8_PRODUCTS`.
    """
    if fp8 not in FP8_PRODUCTS:
        raise ValueError(f"fp8 products: {fp8!r}; one of {', '.join(FP8_PRODUCTS)} is expected.")
    if fp8 == "none" or why_not_fp8([projection.weight for projection in projections], dtype, head_dim):
        return LoraGroup(projections, dtype)
    return Fp8Group(projections, dtype) if fp8 == "both" else Fp8BackwardGroup(projections, dtype)
