"""A frozen weight and its adapter as one matrix, W + B·A, rounded once.

Adding B·A into a W that is already rounded to 16 bit loses it: at a thousandth of W, half of it, at a ten-thousandth
nine tenths. Rounded once, the sum keeps it on average, as noise around the right value.
"""

from __future__ import annotations

import torch

from steep.ops.backend import uses_kernels
from steep.ops.base_weight import BaseWeight, DenseWeight
from steep.ops.int8 import Int8Weight
from steep.ops.nf4 import Nf4Weight
from steep.ops.products import product

CHUNK = 2**24  # elements of W that stand in fp32 at a time, where no kernel merges


def merge_write(weight: BaseWeight, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> None:
    """out = W + b @ a, summed up in fp32 and rounded once. Not differentiable: gradients of B and A are products of
    their own.

    Args:
        weight: [out_features, in_features].
        b: [out_features, r], with the adapter's scale in it; a: [r, in_features], of the same dtype.
        out: [out_features, in_features], in bf16, fp16 or fp32. Rows of b, a and out may be apart.

    Raises:
        ValueError: W stands in 16 bit, and so would the sum: it loses a small adapter. Extend K instead.
    """
    assert tuple(out.shape) == weight.shape == (b.shape[0], a.shape[1]) and b.shape[1] == a.shape[0]
    assert b.dtype == a.dtype and out.stride(1) == a.stride(1) == b.stride(1) == 1
    if isinstance(weight, DenseWeight) and weight.weight.element_size() < 4 and out.element_size() < 4:
        raise ValueError(
            f"A weight in {weight.weight.dtype} is not merged into {out.dtype}: it is rounded already, and what the "
            "adapter adds to it would be lost. Its columns and the adapter's are multiplied side by side instead."
        )
    if isinstance(weight, Nf4Weight) and merges_fast(weight):
        from steep.kernels import nf4_lora

        nf4_lora.merge(
            weight.codes.flatten(),
            weight.absmax,
            weight.code_book,
            weight.nested_absmax,
            weight.offset,
            weight.table,
            weight.block_size,
            weight.nested_block_size,
            b,
            a,
            out,
        )
    elif isinstance(weight, DenseWeight | Int8Weight):
        rows = max(CHUNK // weight.shape[1], 1)
        for start in range(0, weight.shape[0], rows):
            stop = min(start + rows, weight.shape[0])
            out[start:stop] = merge_reference(weight.rows(start, stop), b[start:stop], a)
    else:
        out.copy_(merge_reference(weight, b, a))


def merge_reference(weight: BaseWeight, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """W + b @ a in fp32."""
    total = torch.empty(weight.shape, dtype=torch.float32, device=a.device)
    weight.write(total)
    return product(b, a, add=total, out=total)


def merges_whole(weight: BaseWeight, dtype: torch.dtype) -> bool:
    """Whether `weight` merged into `dtype` keeps what a small adapter adds.

    A weight that is a number of `dtype` itself loses it. So does the largest element of an NF4 block, which is its
    absmax, where the weight was in bf16 before and the absmax is not quantised again: one element in thirty.
    """
    if isinstance(weight, Nf4Weight):
        return weight.code_book is not None
    return isinstance(weight, Int8Weight) or dtype == torch.float32


def merges_fast(weight: BaseWeight) -> bool:
    """Whether a kernel merges it."""
    if not isinstance(weight, Nf4Weight) or not weight.has_kernel or not uses_kernels(weight.codes):
        return False
    from steep.kernels import nf4_lora

    return nf4_lora.runs_on(weight.codes.device)
