"""rms_norm: Llama's and Gemma's form, mixed dtypes, strided rows, in place, in e4m3 too, against fp32 truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steep.kernels import rms_norm as kernels
from steep.ops.backend import vjp
from steep.ops.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward, rms_norm_reference
from tests.ops.closeness import assert_as_good
from tests.ops.fp8_rows import KINDS, assert_quantised, assert_undefined, assert_zeros, fp8_rows
from tests.ops.routes import (
    along,
    assert_nothing_beside,
    assert_refused,
    assert_unchanged,
    cases,
    columns,
    far_apart,
    slack,
    unwritten,
)

EPS = 1e-6
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = cases(
    small=[(1, 64), (3, 1000), (7, 96)],  # a program has one row
    large=[(63, 96), (1000, 576)],
    real=[(4096, 4096), (1000, 5120), (63, 16384), (1000, 8191)],
)
# unit_offset, and the dtypes of x (and its gradient), of the weight, and of the output or the incoming gradient
FORMS = [
    (False, (BF16, BF16, BF16)),
    (True, (FP16, FP32, FP16)),
    (False, (FP32, BF16, BF16)),
    (True, (BF16, FP32, FP32)),
    (True, (FP32, FP32, FP32)),
]


def inputs(
    tokens: int, hidden: int, x_dtype: torch.dtype, weight_dtype: torch.dtype, y_dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, dy and a residual. Rows are of many sizes, down to where eps counts; dy so that each counts in dx."""
    size = torch.logspace(-3, 1, tokens)[:, None]
    x = torch.randn(tokens, hidden) * size
    weight, dy, residual = 0.5 + torch.rand(hidden), torch.randn(tokens, hidden) * size, torch.randn(tokens, hidden)
    return (
        columns(x.to(device, x_dtype)),
        weight.to(device, weight_dtype),
        columns(dy.to(device, y_dtype), before=64),
        columns(residual.to(device, x_dtype), after=16),
    )


def true_gradient(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> torch.Tensor:
    return vjp(lambda x: rms_norm_reference(x, weight.float(), eps, unit_offset), (x.float(),), dy.float())[0]


@pytest.mark.parametrize(("unit_offset", "dtypes"), FORMS)
@pytest.mark.parametrize(("route", "tokens", "hidden"), SHAPES)
def test_forward(
    route: str, tokens: int, hidden: int, unit_offset: bool, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    with along(route, kernels, forward=2) as device:
        x, weight, dy, residual = inputs(tokens, hidden, *dtypes, device)
        out = unwritten(tokens, hidden, dy.dtype, device)
        assert rms_norm_forward(x, weight, EPS, unit_offset=unit_offset, out=out) is out
        added = rms_norm_forward(x, weight, EPS, unit_offset=unit_offset, residual=residual)
    truth = rms_norm_reference(x.float(), weight.float(), EPS, unit_offset)
    assert_as_good(out, rms_norm_reference(x, weight, EPS, unit_offset).to(out.dtype), truth, slack(out.dtype))
    assert_nothing_beside(out)
    reference = rms_norm_reference(x, weight, EPS, unit_offset, residual)
    assert added.dtype == reference.dtype == residual.dtype
    assert_as_good(added, reference, residual.float() + truth, slack(added.dtype))


@pytest.mark.parametrize(("unit_offset", "dtypes"), FORMS)
@pytest.mark.parametrize(("route", "tokens", "hidden"), SHAPES)
def test_backward(
    route: str, tokens: int, hidden: int, unit_offset: bool, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    with along(route, kernels, backward=4) as device:
        x, weight, dy, add = inputs(tokens, hidden, *dtypes, device)
        truth = true_gradient(dy, x, weight, EPS, unit_offset)
        reference, added = truth.to(x.dtype), (add.float() + truth).to(x.dtype)
        true_sum = add.float() + truth
        alone = rms_norm_backward(dy, x, weight, EPS, unit_offset=unit_offset)
        beside = unwritten(tokens, hidden, FP32, device)
        rms_norm_backward(dy, x, weight, EPS, unit_offset=unit_offset, add=add, out=beside)
        assert rms_norm_backward(dy, x, weight, EPS, unit_offset=unit_offset, add=add, out=add) is add
        rms_norm_backward(dy, x, weight, EPS, unit_offset=unit_offset, out=dy)
    assert alone.dtype == x.dtype
    assert_as_good(alone, reference, truth, slack(x.dtype), "alone")
    assert_as_good(beside, true_sum, true_sum, slack(FP32), "into fp32")
    assert_as_good(add, added, true_sum, slack(x.dtype), "in place of add")
    assert_as_good(dy, truth.to(dy.dtype), truth, slack(dy.dtype), "in place of dy")
    for written in (beside, add, dy):
        assert_nothing_beside(written)


QUANTISED = cases(
    small=[(1, 64), (7, 100), (3, 1000)],
    large=[(63, 100), (63, 576)],
    real=[(4096, 4096), (63, 16384), (1000, 8191), (1000, 5120)],
)


@KINDS
@pytest.mark.parametrize(("unit_offset", "dtypes"), [FORMS[0], FORMS[3]])
@pytest.mark.parametrize(("route", "tokens", "hidden"), QUANTISED)
def test_quantised(
    route: str,
    tokens: int,
    hidden: int,
    unit_offset: bool,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    pieces: bool,
    weighted: bool,
) -> None:
    """In e4m3 from fp32, beside an output that stays what it was."""
    with along(route, kernels, forward=4, backward=4) as device:
        x, weight, dy, residual = inputs(tokens, hidden, *dtypes, device)
        normed, added, dx, sum_dx = (
            fp8_rows(tokens, hidden, device, pieces=pieces, weighted=weighted) for _ in range(4)
        )
        form: dict[str, Any] = {"unit_offset": unit_offset}
        plain = [
            rms_norm_forward(x, weight, EPS, **form),
            rms_norm_forward(x, weight, EPS, residual=residual, **form),
            rms_norm_backward(dy, x, weight, EPS, **form),
            rms_norm_backward(dy, x, weight, EPS, add=residual, **form),
        ]
        true_dx, true_sum = true_gradient(dy, x, weight, EPS, unit_offset), residual.float().clone()
        out = unwritten(tokens, hidden, x.dtype, device)
        beside = [
            rms_norm_forward(x, weight, EPS, out=out, quantised=normed, **form),
            rms_norm_forward(x, weight, EPS, residual=residual, quantised=added, **form),
            rms_norm_backward(dy, x, weight, EPS, quantised=dx, **form),
            rms_norm_backward(dy, x, weight, EPS, add=residual, out=residual, quantised=sum_dx, **form),
        ]
    assert_nothing_beside(out)
    truth = rms_norm_reference(x.float(), weight.float(), EPS, unit_offset)
    truths = truth, true_sum + truth, true_dx, true_sum + true_dx
    for written, alone, rows, true in zip(beside, plain, (normed, added, dx, sum_dx), truths, strict=True):
        assert_unchanged(route, written, alone, true)
        assert_quantised(rows, true)


@KINDS
@pytest.mark.parametrize(("route",), cases([()]))
def test_quantised_zeros_and_what_is_not_finite(route: str, pieces: bool, weighted: bool) -> None:
    """An x that is not finite leaves nothing of its row, one in what is added only the row's piece."""
    with along(route, kernels, forward=1, backward=1) as device, np.errstate(invalid="ignore"):
        x, weight, dy, add = inputs(5, 300, FP32, BF16, FP32, device)
        x[0], add[0], dy[0] = 0, 0, 0
        add[1, 140], add[2, 299], add[3, 0] = torch.nan, torch.inf, -torch.inf
        y, dx = (fp8_rows(5, 300, device, pieces=pieces, weighted=weighted) for _ in range(2))
        rms_norm_forward(x, weight, EPS, residual=add, quantised=y)
        rms_norm_backward(dy, x, weight, EPS, add=add, quantised=dx)
    for rows in (y, dx):
        assert_zeros(rows, 0)
        assert_undefined(rows, {1: 140, 2: 299, 3: 0})


@pytest.mark.parametrize(("route",), cases([()]))
def test_output_dtype(route: str) -> None:
    with along(route, kernels, forward=3) as device:
        x, weight, _, residual = inputs(3, 64, BF16, BF16, BF16, device)
        assert rms_norm_forward(x, weight, EPS).dtype == BF16
        assert rms_norm_forward(x, weight, EPS, out_dtype=FP32).dtype == FP32
        assert rms_norm_forward(x, weight, EPS, residual=residual.float()).dtype == FP32


@pytest.mark.parametrize(("route",), cases([()]))
def test_no_tokens(route: str) -> None:
    with along(route, kernels, forward=1, backward=1) as device:
        x, weight, dy, _ = inputs(0, 64, BF16, BF16, BF16, device)
        assert rms_norm_forward(x, weight, EPS).shape == rms_norm_backward(dy, x, weight, EPS).shape == (0, 64)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(("route",), cases([()]))
def test_autograd(route: str, unit_offset: bool) -> None:
    with along(route, kernels, forward=1, backward=1) as device:
        x, weight, dy, residual = (tensor.detach() for tensor in inputs(9, 96, FP32, FP32, FP32, device))
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y = rms_norm(leaves[0], weight, EPS, unit_offset=unit_offset, residual=leaves[1])
        dx, dresidual = torch.autograd.grad(y, leaves, dy)
    truth = true_gradient(dy, x, weight, EPS, unit_offset)
    assert_as_good(dx, truth, truth, slack(FP32))
    assert torch.equal(dresidual, dy)


def test_a_trained_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="freeze it"):
        rms_norm(torch.randn(2, 8), torch.ones(8, requires_grad=True), EPS)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_planted_faults_are_refused(dtype: torch.dtype) -> None:
    x, weight, dy, residual = inputs(63, 96, dtype, dtype, dtype, "cpu")
    truth = rms_norm_reference(x.float(), weight.float(), EPS)
    reference = rms_norm_reference(x, weight, EPS)
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    deviation = x.float() - x.float().mean(-1, keepdim=True)
    for fault in (
        rms_norm_reference(x, weight, 0.0),
        rms_norm_reference(x, weight, EPS * 2),
        rms_norm_reference(x, weight, EPS, unit_offset=True),
        rms_norm_reference(x, weight.roll(1), EPS),
        reference.roll(1, 0),
        reference.where(torch.arange(96) < 95, float("nan")),
        (deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(dtype),
    ):
        assert_refused(fault, reference, truth)
    assert_refused(reference, rms_norm_reference(x, weight, EPS, False, residual), truth + residual.float())
    true_dx = true_gradient(dy, x, weight, EPS, False)
    for fault in (
        dy.float() * weight.float() * rstd,  # without the part along x
        true_gradient(dy, x, weight, 0.0, False),
        true_gradient(dy, x, weight, EPS, True),
        true_dx / rstd,
        true_dx + residual.float(),
    ):
        assert_refused(fault.to(dtype), true_dx.to(dtype), true_dx)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    x, weight, dy, _ = inputs(3, 512, BF16, BF16, BF16, "cuda")
    far = far_apart(x)
    assert torch.equal(rms_norm_forward(far, weight, EPS), rms_norm_forward(x, weight, EPS))
    expected = rms_norm_backward(dy, x, weight, EPS)
    assert torch.equal(rms_norm_backward(dy, far, weight, EPS, out=far), expected)
