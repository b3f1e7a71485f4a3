"""copy_rows: to the bit, whatever the shapes, the strides and the dtypes."""

from __future__ import annotations

import pytest
import torch

from steep.kernels import copy_rows as kernels
from steep.ops.copy_rows import copy_rows
from tests.ops.routes import along, assert_nothing_beside, cases, columns

CASES = cases(
    small=[(1, 8), (63, 100), (9, 5000)], large=[(1000, 576)], real=[(4096, 4096), (16384, 1024), (7, 128256)]
)


@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("route", "rows", "width"), CASES)
def test_every_element(route: str, rows: int, width: int, source_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    with along(route, kernels, copy_rows=1) as device:
        source = columns(torch.randn(rows, width, device=device).to(source_dtype))
        target = columns(torch.full((rows, width), torch.nan, device=device, dtype=target_dtype), before=16)
        copy_rows(source, target)
    assert torch.equal(target, source.to(target_dtype))
    assert_nothing_beside(target)
