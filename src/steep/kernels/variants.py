"""Launches that find their compiled kernel without looking at every argument.

Triton compiles a variant of a kernel for the types of its arguments, the alignment of its addresses, and numbers that
are 1 or multiples of 16. To find it, each launch looks at all arguments: for a kernel with twenty that takes the host
several times as long as the launch. A caller whose arguments are the same but for a few looks at those alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch


class Variants:
    """The compiled variants of one kernel for one caller."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def launch(self, kernel: Any, key: Hashable, grid: tuple[int, int, int], *args: Any, **options: Any) -> None:
        """`kernel[grid](*args, **options)`.

        Args:
            kernel: the same at each call, and `options` too.
            key: whatever the variant depends on and is not the same at each call: `place` of an address, numbers.
            args: all arguments of the kernel in their order, constants too.
        """
        compiled = self._known.get(key)
        if compiled is None:
            self._known[key] = kernel[grid](*args, **options)  # None in Triton's interpreter, which compiles nothing
        else:
            compiled[grid](*args)


def place(tensor: torch.Tensor) -> tuple[torch.device, torch.dtype, bool]:
    """What a variant depends on of an address."""
    return tensor.device, tensor.dtype, tensor.data_ptr() % 16 == 0
