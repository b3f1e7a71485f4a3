"""What the tiles of a layer share: the filled weight buffers that they read, and the gradients that they add to."""

from __future__ import annotations

import math
from typing import Any

import torch

from steep.ops.lora import GradientProduct, Group
from steep.ops.lora_layout import ALIGNMENT


class Weights:
    """The weight buffer of a group: filled when it is first read, and gone after so many uses.

    Args:
        uses: by as many tiles, or passes over them.
    """

    def __init__(self, group: Group, device: torch.device, uses: int) -> None:
        self._group, self._device, self._uses = group, device, uses
        self._buffer: Any = None

    @property
    def buffer(self) -> Any:
        if self._buffer is None:
            self._buffer = self._group.filled_buffer(self._device)
        return self._buffer

    def used(self) -> None:
        """One use is over."""
        self._uses -= 1
        if not self._uses:
            self._buffer = None


class AdapterGradients:
    """The gradients of a group's adapters. Those of several tiles are summed in fp32, by the products themselves, in
    one piece of memory, which becomes what autograd keeps in one step where that is of one dtype."""

    def __init__(self, group: Group, tiles: int) -> None:
        self._group, self._sums = group, tiles > 1
        self._gradients: list[torch.Tensor | None] = []
        self._products: list[GradientProduct] = []
        self._whole: torch.Tensor | None = None
        self._parts: list[torch.Tensor] = []  # of the whole, what each product makes

    def add(self, dye: torch.Tensor, xe: torch.Tensor) -> None:
        """Of one tile: see `Group.adapter_gradients`."""
        if not self._sums:
            self._gradients = self._group.adapter_gradients(dye, xe)
            return
        adds = self._whole is not None
        if self._whole is None:
            self._products = self._group.gradient_products()
            sizes = [_padded(each.shape) for each in self._products]
            self._whole = torch.empty(sum(sizes), dtype=torch.float32, device=dye.device)
            self._parts = self._parts_of(self._whole)
        for each, part in zip(self._products, self._parts, strict=True):
            each.write(dye, xe, part, adds=adds)

    def take(self) -> list[torch.Tensor]:
        """Those that are asked for, in what autograd keeps of each."""
        gradients, self._gradients = self._gradients, []
        if self._whole is not None:
            whole, parts, self._whole, self._parts = self._whole, self._parts, None, []
            dtypes = [each.dtype for each in self._products]
            if len(set(dtypes)) == 1:
                parts = self._parts_of(whole.to(dtypes[0]))
            else:
                parts = [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
            gradients = self._group.gradients_of(self._products, parts)
        return [gradient for gradient in gradients if gradient is not None]

    def _parts_of(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """What each product makes."""
        parts = whole.split([_padded(each.shape) for each in self._products])
        return [
            part[: math.prod(each.shape)].view(each.shape) for each, part in zip(self._products, parts, strict=True)
        ]


def _padded(shape: tuple[int, int]) -> int:
    """Elements that such a product takes, so that the next one begins at a multiple of ALIGNMENT."""
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
