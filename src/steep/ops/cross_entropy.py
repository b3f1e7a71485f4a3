"""Cross-entropy over a tile of products z = x Wᵀ: the kernels, and the same in plain torch.

The logit is v = scale · z, or v = softcap · tanh(scale · z / softcap), the loss lse - v[label] with
lse = log(sum(exp(v))), and its gradient by z is g = (softmax(v) - one-hot(label)) · dv/dz. All arithmetic is in fp32.

A token whose label is `ignore_index` has loss and gradient 0. Any other label outside of the vocabulary makes its loss
and gradient NaN: nothing is read out of bounds, and nobody has to wait for the device to be told. So does a NaN or +inf
among the products. A product of -inf is a probability of 0, but under a cap, which would hide it, a NaN too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steep.ops.backend import uses_kernels


def nothing_yet(labels: torch.Tensor) -> torch.Tensor:
    """`running` [3, T] of `CrossEntropy.take_in` before any column."""
    running = torch.zeros(3, len(labels), dtype=torch.float32, device=labels.device)
    running[0].fill_(-torch.inf)
    return running


def product_buffer(num_rows: int, num_columns: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised, rows on boundaries of 64 elements: kernels and products then read an odd vocabulary as fast."""
    return torch.empty(num_rows, -(-num_columns // 64) * 64, dtype=like.dtype, device=like.device)


def _within(labels: torch.Tensor, first: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A column [T, 1] that can be read for every label, and whether it is the label's own."""
    place = labels - first
    return place.clamp(0, num_columns - 1)[:, None], (place >= 0) & (place < num_columns)


@dataclass(frozen=True)
class CrossEntropy:
    """From products to losses and gradients. `products` [T, C] are the first columns of a `product_buffer`."""

    ignore_index: int
    scale: float
    softcap: float | None

    def logits(self, products: torch.Tensor) -> torch.Tensor:
        """v, in fp32. The cap would hide an overflow: that becomes a NaN."""
        values = products.float() * self.scale
        if self.softcap is None:
            return values
        return self.softcap * torch.tanh(values.masked_fill(values.isinf(), torch.nan) / self.softcap)

    def take_in(self, products: torch.Tensor, labels: torch.Tensor, running: torch.Tensor, first: int) -> None:
        """Take the columns from `first` on into `running` [3, T]: maximum, sum of exponentials, the label's logit."""
        if uses_kernels(products):
            from steep.kernels import cross_entropy as kernels

            kernels.statistics(products, labels, running, first, self.ignore_index, self.scale, self.softcap)
            return
        values = self.logits(products)
        maximum, total, target = running
        higher = torch.maximum(maximum, values.amax(1))
        total.copy_(total * torch.exp(maximum - higher) + torch.exp(values - higher[:, None]).sum(1))
        maximum.copy_(higher)
        index, inside = _within(labels, first, products.shape[1])
        target.copy_(torch.where(inside, values.gather(1, index)[:, 0], target))

    def losses(
        self, running: torch.Tensor, labels: torch.Tensor, num_columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, lse), both fp32 [T], once all columns are taken in."""
        maximum, total, target = running
        ignored = labels == self.ignore_index
        unknown = ~ignored & ((labels < 0) | (labels >= num_columns))
        lse = (maximum + total.log()).masked_fill(unknown, torch.nan)
        return (lse - target).masked_fill(ignored, 0), lse

    def turn(
        self, products: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, factor: torch.Tensor, first: int
    ) -> None:
        """Turn the columns from `first` on into factor · g / scale, in place. `factor`: one fp32 on the device."""
        if uses_kernels(products):
            from steep.kernels import cross_entropy as kernels

            kernels.gradient(products, labels, lse, factor, first, self.ignore_index, self.scale, self.softcap)
            return
        values = self.logits(products)
        result = torch.exp(values - lse[:, None])
        index, inside = _within(labels, first, products.shape[1])
        result.scatter_add_(1, index, -inside[:, None].float())
        if self.softcap is not None:
            result *= 1 - (values / self.softcap).square()
        result *= factor
        products.copy_(result.masked_fill_((labels == self.ignore_index)[:, None], 0))

    def losses_and_turn(self, products: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """The losses of whole rows, which become factor · g / scale in place."""
        if uses_kernels(products):
            from steep.kernels import cross_entropy as kernels

            losses = torch.empty(len(labels), dtype=torch.float32, device=labels.device)
            kernels.loss_and_gradient(products, labels, losses, factor, self.ignore_index, self.scale, self.softcap)
            return losses
        running = nothing_yet(labels)
        self.take_in(products, labels, running, 0)
        losses, lse = self.losses(running, labels, products.shape[1])
        self.turn(products, labels, lse, factor, 0)
        return losses


def scaled(source: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """source · factor in fp32, rounded into `dtype`: in place where the dtype allows, and then on a GPU without a pass
    over memory where the factor, one fp32 on the device, is 1."""
    out = source if source.dtype == dtype else torch.empty_like(source, dtype=dtype)
    if uses_kernels(source):
        from steep.kernels import cross_entropy as kernels

        kernels.scaled(source, out, factor)
        return out
    return out.copy_(source.float() * factor)
