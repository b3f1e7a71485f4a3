"""What the tiles of a layer share: the filled weight buffers that they read, and the gradients that they add to."""

from __future__ import annotations

from typing import Any

import torch

from steep.ops.backend import gradient_dtype
from steep.ops.lora import Group


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
    """The gradients of a group's adapters, summed over tiles in fp32; those of a single one are not summed."""

    def __init__(self, group: Group, tiles: int) -> None:
        self._group, self._sums = group, tiles > 1
        self._gradients: list[torch.Tensor | None] = []

    def add(self, dye: torch.Tensor, xe: torch.Tensor) -> None:
        """Of one tile: see `Group.adapter_gradients`."""
        of_tile = self._group.adapter_gradients(dye, xe, torch.float32 if self._sums else None)
        if not self._gradients:
            self._gradients = of_tile
            return
        for whole, part in zip(self._gradients, of_tile, strict=True):
            if whole is not None and part is not None:
                whole.add_(part)

    def take(self) -> list[torch.Tensor]:
        """Those that are asked for, in what autograd keeps of each."""
        trained = [tensor for each in self._group.projections for tensor in each.tensors()]
        gradients, self._gradients = self._gradients, []
        return [
            gradient.to(gradient_dtype(tensor))
            for tensor, gradient in zip(trained, gradients, strict=True)
            if gradient is not None
        ]
