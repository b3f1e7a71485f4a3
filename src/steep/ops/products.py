"""Matrix products that accumulate in fp32 and round into the dtype that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def sums_in_fp32() -> Iterator[None]:
    """Products inside are summed in fp32 to the end. cuBLAS may split a long K, and torch lets it add the parts in 16
    bit (`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`, and fp16's): a second rounding.

    Of the whole process, as torch's setting is: not for two threads at once. Whether K is split stays cuBLAS's choice.
    """
    bf16 = torch._C._get_cublas_allow_bf16_reduced_precision_reduction()
    fp16 = torch._C._get_cublas_allow_fp16_reduced_precision_reduction()
    torch._C._set_cublas_allow_bf16_reduced_precision_reduction(False, bf16[1])
    torch._C._set_cublas_allow_fp16_reduced_precision_reduction(False, fp16[1])
    try:
        yield
    finally:
        torch._C._set_cublas_allow_bf16_reduced_precision_reduction(*bf16)
        torch._C._set_cublas_allow_fp16_reduced_precision_reduction(*fp16)


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    add: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """add + scale * (a @ b), accumulated in fp32 and rounded into `out_dtype`.

    It is rounded once without `add`. With it, in 16 bit on a GPU, cuBLAS may round the product before it adds (its
    kernels for Hopper do) and then the sum, as a product and an addition by themselves would. Outside of
    `sums_in_fp32` parts of the product's own sum may be added in 16 bit, too.

    Args:
        a, b: [M, K] and [K, N] of one dtype; transposed views and columns of wider buffers are read in place.
        add: [M, N] or [N], of `out_dtype`; may be `out`.
        out: where to write [M, N]; its rows may be apart (columns of a wider buffer).
        out_dtype: default: that of `out`, else of `a`. One that is neither a's nor fp32 takes an fp32 product beside
            it.
        scale: a factor of the fp32 product.
    """
    if out is None and add is None and scale == 1.0 and out_dtype in (None, a.dtype):
        return torch.mm(a, b)
    if out_dtype is None:
        out_dtype = a.dtype if out is None else out.dtype
    if out is None:
        out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    if add is None and scale != 1.0:  # torch has a scale beside a summand only: `out` stands for one, times 0
        summand, beta = out, 0.0
    else:
        summand, beta = add, 1.0
    if out_dtype == a.dtype:
        if summand is None:
            return torch.mm(a, b, out=out)
        return torch.addmm(summand, a, b, beta=beta, alpha=scale, out=out)
    if a.is_cuda and out_dtype == torch.float32:
        if summand is None:
            return torch.ops.aten.mm.dtype_out(a, b, out_dtype, out=out)
        if summand.shape != out.shape:  # a view of `out` would be copied onto it
            summand = summand.expand(out.shape)
        return torch.ops.aten.addmm.dtype_out(summand, a, b, out_dtype, beta=beta, alpha=scale, out=out)
    if a.is_cuda:  # torch has products of 16 bit in their own dtype and in fp32
        exact = product(a, b, add=None if add is None else add.float(), out_dtype=torch.float32, scale=scale)
        return out.copy_(exact)
    exact = (a.float() @ b.float()) * scale  # torch has mixed products on CUDA only
    return out.copy_(exact if add is None else add.float() + exact)
