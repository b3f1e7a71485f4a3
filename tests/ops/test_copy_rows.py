"""copy_rows: to the bit, whatever the shapes, the strides and the dtypes; in e4m3 too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steep.kernels import copy_rows as kernels
from steep.ops.copy_rows import contiguous, copy_rows, join_rows
from tests.ops.fp8_rows import KINDS, assert_quantised, assert_undefined, assert_zeros, fp8_rows
from tests.ops.routes import along, assert_nothing_beside, cases, columns, far_apart

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


@KINDS
@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("route", "tokens", "width"),
    cases(
        small=[(1, 8), (63, 100), (13, 576), (3, 5000)],
        large=[(1000, 576)],
        real=[(4096, 4096), (1000, 14336), (63, 16384), (1000, 1001)],
    ),
)
def test_quantised(
    route: str,
    tokens: int,
    width: int,
    source_dtype: torch.dtype,
    target_dtype: torch.dtype,
    pieces: bool,
    weighted: bool,
) -> None:
    with along(route, kernels, copy_quantised=1) as device:
        size = torch.logspace(-3, 1, tokens, device=device)[:, None]
        source = columns((torch.randn(tokens, width, device=device) * size).to(source_dtype))
        target = columns(torch.full((tokens, width), torch.nan, device=device, dtype=target_dtype), before=16)
        rows = fp8_rows(tokens, width, device, pieces=pieces, weighted=weighted)
        copy_rows(source, target, quantised=rows)
    assert torch.equal(target, source.to(target_dtype))
    assert_nothing_beside(target)
    assert_quantised(rows, source.float())


@KINDS
@pytest.mark.parametrize(("route",), cases([()]))
def test_quantised_zeros_and_what_is_not_finite(route: str, pieces: bool, weighted: bool) -> None:
    with along(route, kernels, copy_quantised=1) as device, np.errstate(invalid="ignore"):
        source = torch.randn(5, 300, device=device).bfloat16()
        source[0], source[1, 140], source[2, 299], source[3, 0] = 0, torch.nan, torch.inf, -torch.inf
        rows = fp8_rows(5, 300, device, pieces=pieces, weighted=weighted)
        copy_rows(source, torch.empty_like(source), quantised=rows)
    assert_zeros(rows, 0)
    assert_undefined(rows, {1: 140, 2: 299, 3: 0})


@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("route", "rows", "width", "other_width"),
    cases(
        small=[(1, 8, 8), (63, 100, 36), (9, 40, 5000)],
        large=[(1000, 576, 192)],
        real=[(4096, 4096, 1024), (16384, 2048, 512), (4096, 2048, 1024)],
    ),
)
def test_three_side_by_side(
    route: str, rows: int, width: int, other_width: int, source_dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    with along(route, kernels, join_rows=1) as device:
        first, second, third = (
            columns(torch.randn(rows, each, device=device).to(source_dtype), before)
            for each, before in ((width, 16), (other_width, 8), (other_width, 24))
        )
        whole = torch.full((rows, width + 2 * other_width), torch.nan, device=device, dtype=target_dtype)
        target = columns(whole, before=16)
        join_rows((first, second, third), target)
    assert torch.equal(target, torch.cat((first, second, third), 1).to(target_dtype))
    assert_nothing_beside(target)


def test_contiguous_copies_where_rows_are_apart_only() -> None:
    apart = columns(torch.randn(5, 4, 6).flatten(1)).unflatten(1, (4, 6))
    close = contiguous(apart)
    assert close.is_contiguous() and torch.equal(close, apart)
    assert contiguous(close) is close


@pytest.mark.gpu
def test_rows_far_apart() -> None:
    """The third begins beyond 2^31 elements, in the source or in the target."""
    source = torch.randn(3, 100, device="cuda").bfloat16()
    for given in (source, far_apart(source)):
        for target in (torch.empty_like(source), far_apart(torch.full_like(source, torch.nan))):
            with along("gpu", kernels, copy_rows=1):
                copy_rows(given, target)
            assert torch.equal(target, source)


@pytest.mark.gpu
def test_three_whose_rows_are_far_apart() -> None:
    source = torch.randn(3, 100, device="cuda").bfloat16()
    parts = source[:, :60], source[:, 60:80], source[:, 80:]
    for given in (parts, (far_apart(parts[0]), far_apart(parts[1]), far_apart(parts[2]))):
        target = far_apart(torch.full_like(source, torch.nan))
        with along("gpu", kernels, join_rows=1):
            join_rows(given, target)
        assert torch.equal(target, source)
