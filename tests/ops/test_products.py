from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from steep.ops.products import product, sums_in_fp32
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
def test_product(device, dtype, out_dtype, summand, scale, columns_of_wider, transposed) -> None:
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
    with sums_in_fp32():
        result = product(a, b, add=add, out=out, out_dtype=out_dtype, scale=scale)
    assert out is None or result is out or result.data_ptr() == out.data_ptr()
    assert result.dtype == (out_dtype or dtype)
    # With a summand of its own size, cuBLAS's kernels for Hopper round before they add: sqrt(1 + 1/2) times the error.
    roundings = 1.3 if device == "cuda" and add is not None and result.dtype != torch.float32 else 1.0
    assert error(result, exact) < roundings * ONE_ROUNDING[result.dtype]


_REDUCTIONS = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]


def _reductions() -> list[tuple[bool, bool]]:
    matmul = torch.backends.cuda.matmul
    return [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in _REDUCTIONS]


@pytest.fixture(params=[(True, True), (False, False)], ids=["allowed", "not"])
def reductions(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    """Torch's settings of sums in 16 bit, both so."""
    before = _reductions()
    for name in _REDUCTIONS:
        setattr(torch.backends.cuda.matmul, name, request.param)
    yield request.param
    for name, value in zip(_REDUCTIONS, before, strict=True):
        setattr(torch.backends.cuda.matmul, name, value)


def test_sums_in_fp32_leaves_torchs_settings_as_they_were(reductions: tuple[bool, bool]) -> None:
    off = (False, reductions[1])
    with pytest.raises(KeyError), sums_in_fp32():
        assert _reductions() == [off, off]
        with sums_in_fp32():
            pass
        assert _reductions() == [off, off]
        raise KeyError
    assert _reductions() == [reductions, reductions]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_any_dtype_is_rounded_into(device: str, dtype: torch.dtype, out_dtype: torch.dtype, scale: float) -> None:
    """As a residual stream in bf16 needs it under products in fp16 or fp32, which torch's own products refuse."""
    a, b = (torch.randn(shape).to(device, dtype) for shape in ((33, 40), (40, 24)))
    add = torch.randn(33, 24).to(device, out_dtype)
    truth = scale * (a.double() @ b.double())
    assert error(product(a, b, out_dtype=out_dtype, scale=scale), truth) < ONE_ROUNDING[out_dtype]
    out = add.clone()
    product(a, b, add=out, out=out, scale=scale)
    assert out.dtype == out_dtype and error(out, truth + add.double()) < ONE_ROUNDING[out_dtype]
    assert error(out / 2, truth + add.double()) > ONE_ROUNDING[out_dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_sum_is_rounded_once(dtype: torch.dtype) -> None:
    """Few outputs and a long K, which cuBLAS splits."""
    a, b = (torch.randn(shape).to("cuda", dtype) for shape in ((64, 65536), (65536, 64)))
    with sums_in_fp32():
        result = product(a, b)
    assert error(result, a.double() @ b.double()) < ONE_ROUNDING[dtype]
