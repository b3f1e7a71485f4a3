"""The interpreter of the kernel tests computes what a GPU does, in bf16 too."""

# pyright: reportArgumentType=false
# (a launch takes constants as plain numbers)

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _product(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _cast(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(dtype: torch.dtype) -> None:
    a, b, out = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.full((32, 32), float("nan"))
    _product[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_rounds_to_the_nearest_even(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 - 2**-9, 1e-41, torch.inf, -torch.inf])
    x = torch.cat([special, torch.randn(1015), torch.tensor([torch.nan])])
    out = torch.zeros(1024, dtype=dtype)
    _cast[(1,)](x, out, SIZE=1024)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert out[1].signbit()
