from __future__ import annotations

import pytest
import torch

from steep.ops.products import product
from tests.ops.closeness import error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ONE_ROUNDING = {torch.bfloat16: 1.8e-3, torch.float16: 2.2e-4, torch.float32: 1e-6}  # RMS, relative; bf16's is 1.66e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("summand", [None, "row", "matrix", "out"])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("columns_of_wider", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_rounds_once(device, dtype, out_dtype, summand, scale, columns_of_wider, transposed) -> None:
    a, b = torch.randn(63, 264), torch.randn(264, 96) / 16
    a, b = (tensor.to(device, dtype) for tensor in (a.t().contiguous().t() if transposed else a, b))
    how = {"device": device, "dtype": out_dtype or dtype}
    add = None if summand is None else torch.randn(96 if summand == "row" else (63, 96)).to(**how)
    exact = scale * (a.double() @ b.double()) + (0 if add is None else add.double())
    out = None
    if columns_of_wider:
        out = torch.full((63, 128), torch.nan, **how)[:, 16:112]
    if add is not None and summand == "out":
        out = add.clone() if out is None else out.copy_(add)
        add = out
    result = product(a, b, add=add, out=out, out_dtype=out_dtype, scale=scale)
    assert out is None or result is out or result.data_ptr() == out.data_ptr()
    assert result.dtype == (out_dtype or dtype)
    assert error(result, exact) < ONE_ROUNDING[result.dtype]
