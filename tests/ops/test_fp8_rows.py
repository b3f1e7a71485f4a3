"""Rows in e4m3: what the tests of the ops that write them let pass, and what not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from steep.ops.fp8 import E4M3, Fp8Rows, quantise_reference
from tests.ops.fp8_rows import assert_quantised, assert_undefined, assert_zeros, fp8_rows

PIECES = pytest.mark.parametrize("pieces", [False, True], ids=["rows", "pieces"])
Fault = Callable[[Fp8Rows, torch.Tensor], None]


def halved_codes(rows: Fp8Rows, values: torch.Tensor) -> None:
    rows.codes.copy_((rows.codes.float() / 2).to(E4M3))


def a_halved_code(rows: Fp8Rows, values: torch.Tensor) -> None:
    rows.codes[5, 7] = float(rows.codes[5, 7].float() / 2)


def swapped_scales(rows: Fp8Rows, values: torch.Tensor) -> None:
    rows.scale.copy_(rows.scale.flip(0))


def a_scale_of_another_row(rows: Fp8Rows, values: torch.Tensor) -> None:
    rows.scale[3] = rows.scale[4]


def a_step_more(rows: Fp8Rows, values: torch.Tensor) -> None:
    rows.codes.view(torch.uint8)[::2, ::100] += 1  # half a percent of the codes


def rounded_twice(rows: Fp8Rows, values: torch.Tensor) -> None:
    quantise_reference(values.bfloat16(), rows)


def cut_off(rows: Fp8Rows, values: torch.Tensor) -> None:
    quantise_reference(values * (1 - 2**-5), rows)


def no_factors(rows: Fp8Rows, values: torch.Tensor) -> None:
    quantise_reference(values, Fp8Rows(rows.codes, rows.scale))


def other_factors(rows: Fp8Rows, values: torch.Tensor) -> None:
    assert rows.factors is not None
    quantise_reference(values, Fp8Rows(rows.codes, rows.scale, rows.factors.roll(1)))


def one_scale_for_all(rows: Fp8Rows, values: torch.Tensor) -> None:
    assert rows.factors is not None
    quantise_reference(values, rows)
    values, scale = values * rows.factors, rows.scale.max()
    rows.scale.fill_(scale)
    rows.codes.copy_((values / scale).to(E4M3))


def unwritten_column(rows: Fp8Rows, values: torch.Tensor) -> None:
    rows.codes[:, -1] = torch.nan


def unwritten_scale(rows: Fp8Rows, values: torch.Tensor) -> None:
    rows.scale[-1] = torch.nan


def a_code_beside(rows: Fp8Rows, values: torch.Tensor) -> None:
    assert rows.codes._base is not None
    rows.codes._base[-1, -1] = 0.0


FAULTS = [
    halved_codes, a_halved_code, swapped_scales, a_scale_of_another_row, a_step_more, rounded_twice, cut_off,
    no_factors, other_factors, one_scale_for_all, unwritten_column, unwritten_scale, a_code_beside,
]  # fmt: skip


@PIECES
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_refused(fault: Fault, pieces: bool) -> None:
    values = torch.randn(64, 576) * torch.logspace(-3, 1, 64)[:, None]
    rows = fp8_rows(64, 576, "cpu", pieces=pieces, weighted=True)
    quantise_reference(values, rows)
    assert_quantised(rows, values)
    fault(rows, values)
    with pytest.raises(AssertionError):
        assert_quantised(rows, values)


@PIECES
def test_what_is_not_finite_is_found(pieces: bool) -> None:
    values = torch.randn(3, 300)
    values[0], values[1, 140], values[2, 299] = 0, torch.nan, -torch.inf
    rows = fp8_rows(3, 300, "cpu", pieces=pieces, weighted=False)
    quantise_reference(values, rows)
    assert_zeros(rows, 0)
    assert_undefined(rows, {1: 140, 2: 299})
    quantise_reference(values.nan_to_num(1.0, neginf=-448.0), rows)
    with pytest.raises(AssertionError):
        assert_undefined(rows, {1: 140, 2: 299})


@PIECES
def test_rows_are_of_the_shape_that_is_written(pieces: bool) -> None:
    rows = fp8_rows(4, 576, "cpu", pieces=pieces, weighted=True)
    assert rows.parts(4, 576) == (rows.codes, rows.scale, rows.factors)
    for tokens, columns in ((3, 576), (4, 577)):
        with pytest.raises(AssertionError):
            rows.parts(tokens, columns)


def test_rows_that_no_kernel_writes_are_refused() -> None:
    good = fp8_rows(4, 576, "cpu", pieces=False, weighted=True)
    assert good.factors is not None
    packed = torch.empty(4, 570, dtype=E4M3)
    for rows in (
        Fp8Rows(packed, good.scale),  # rows apart by no multiple of 16
        Fp8Rows(good.codes[:, ::2], good.scale),
        Fp8Rows(good.codes, good.scale.double()),
        Fp8Rows(good.codes, good.scale[:3]),
        Fp8Rows(good.codes, good.scale[:, None].expand(4, 5)),
        Fp8Rows(good.codes, good.scale, good.factors[1:]),
        Fp8Rows(good.codes, good.scale, good.factors.bfloat16()),
    ):
        with pytest.raises(AssertionError):
            rows.parts(4, rows.codes.shape[1])
