"""Rows into columns of a wider buffer, in the buffer's dtype, and in e4m3."""

from __future__ import annotations

import torch

from steep.ops.backend import uses_kernels
from steep.ops.fp8 import Fp8Rows, quantise_reference


def copy_rows(source: torch.Tensor, target: torch.Tensor, *, quantised: Fp8Rows | None = None) -> None:
    """Write `source` [T, n] into `target` [T, n], rounded once where the dtypes differ, and into `quantised` in e4m3.
    Rows of all may be apart."""
    assert source.shape == target.shape and source.stride(1) == target.stride(1) == 1, (source.shape, target.shape)
    if not uses_kernels(target):
        if quantised is not None:
            quantise_reference(source, quantised)
        target.copy_(source)
        return
    from steep.kernels import copy_rows as kernels

    if quantised is None:
        kernels.copy_rows(source, target)
    else:
        kernels.copy_quantised(source, target, quantised.parts(*source.shape))


def join_rows(sources: tuple[torch.Tensor, torch.Tensor, torch.Tensor], target: torch.Tensor) -> None:
    """Write three tensors side by side: [T, n] and twice [T, m] of one dtype into `target` [T, n + 2 m], rounded once
    where its dtype is another. Rows of all may be apart."""
    first, second, third = sources
    rows, columns = target.shape
    assert first.shape[0] == second.shape[0] == rows and second.shape == third.shape, (first.shape, second.shape)
    assert first.shape[1] + 2 * second.shape[1] == columns, (first.shape, second.shape, target.shape)
    assert first.stride(1) == second.stride(1) == third.stride(1) == target.stride(1) == 1, target.stride()
    if not uses_kernels(target):
        torch.cat(sources, 1, out=target)
        return
    from steep.kernels import copy_rows as kernels

    kernels.join_rows(first, second, third, target)


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x` [T, ...], or a copy of it without gaps between its rows, which torch's own copy reads at a third of the
    card's speed."""
    if x.is_contiguous():
        return x
    copy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    copy_rows(x.flatten(1), copy.flatten(1))
    return copy
