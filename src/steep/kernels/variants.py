"""Launches that find their compiled kernel faster than Triton does.

Triton compiles a variant of a kernel for the types of its arguments, the alignment of its addresses, and numbers that
are 1 or multiples of 16, and loads it on the current device. To find it, each launch looks at all arguments and
options: that takes the host longer than the launch itself, several times as long for a kernel with twenty arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

Grid = tuple[int, int, int]

_known: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    grid: Grid,
    tensors: Sequence[torch.Tensor | None],
    numbers: tuple[float, ...],
    free: tuple[int, ...] = (),
    **options: Any,
) -> None:
    """`kernel[grid](*tensors, *free, *numbers, **options)`: its variant is looked up without asking Triton.

    Args:
        tensors: the first of them is there.
        numbers: constants too.
        free: numbers for which the kernel is not specialised, and which change often.
    """
    device = tensors[0].device  # pyright: ignore[reportOptionalMemberAccess]
    key: list[Hashable] = [id(kernel), device, numbers, *options.items()]
    for tensor in tensors:
        key += (None,) if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0)
    variant = tuple(key)
    compiled = _known.get(variant)
    if compiled is None:
        with torch.cuda.device_of(tensors[0]):  # pyright: ignore[reportArgumentType]
            _known[variant] = kernel[grid](*tensors, *free, *numbers, **options)  # None in Triton's interpreter
    else:
        compiled[grid](*tensors, *free, *numbers)


class Prepared:
    """Launches of one kernel by one caller that differ in the kernel's first argument alone, a tensor to write: all
    others are put together once for each kind of it."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def launch(
        self,
        kernel: Any,
        out: torch.Tensor,
        arguments: Callable[[], tuple[Grid, tuple[Any, ...]]],
        *,
        number: int = 0,
        **options: Any,
    ) -> None:
        """`kernel[grid](out, *args, **options)`.

        Args:
            kernel: the same at each call with this `number`, and `options` too.
            arguments: gives grid and args, constants too. They may depend on out's device, dtype, stride and alignment.
            number: which of the caller's launches it is.
        """
        key = number, out.device, out.dtype, out.stride(0), out.data_ptr() % 16 == 0
        known = self._known.get(key)
        if known is not None:
            run, args = known
            run(out, *args)
            return
        grid, args = arguments()
        with torch.cuda.device_of(out):
            compiled = kernel[grid](out, *args, **options)
        if compiled is not None:  # as it is in Triton's interpreter
            self._known[key] = compiled[grid], args
