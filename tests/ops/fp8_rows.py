"""Rows in e4m3 that an op writes, for its tests: where they stand, and how near they have to be."""

from __future__ import annotations

import pytest
import torch

from steep.ops.fp8 import E4M3, Fp8Rows, dequantise_rows, empty_fp8_rows, quantise_reference
from tests.ops.closeness import assert_as_good

BEFORE, AFTER = 16, 32  # columns of the buffer that the codes stand in
UNWRITTEN = 0x7F  # NaN
SCALES = 1e-5  # relative: the largest value of a row, in fp32 by another formula
FAR = 1e-7  # share of the codes that may be two steps away: of a difference of larger terms, which rounds as they do
STEPS = 1e-3  # share of the codes that may be the next one, where a value lies between two within fp32's rounding
ERROR = 1e-5  # of what the rows stand for, beside the reference's: one code in 3,000 moves it by this

KINDS = pytest.mark.parametrize(
    ("pieces", "weighted"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["rows", "weighted rows", "pieces", "weighted pieces"],
)


def fp8_rows(tokens: int, columns: int, device: str, *, pieces: bool, weighted: bool) -> Fp8Rows:
    """Rows to write into, all NaN, columns of a wider buffer; `weighted`: with factors of many sizes."""
    width = -(-(BEFORE + columns + AFTER) // 16) * 16
    buffer = torch.full((tokens, width), UNWRITTEN, dtype=torch.uint8, device=device).view(E4M3)
    scale = torch.full_like(
        empty_fp8_rows(tokens, columns, torch.device(device), pieces=pieces).scale, fill_value=torch.nan
    )
    factors = torch.logspace(-3, 1, columns)[torch.randperm(columns)].to(device) if weighted else None
    return Fp8Rows(buffer[:, BEFORE : BEFORE + columns], scale, factors)


def on_cpu(rows: Fp8Rows) -> Fp8Rows:
    codes = rows.codes.view(torch.uint8).cpu().view(E4M3)
    return Fp8Rows(codes, rows.scale.cpu(), None if rows.factors is None else rows.factors.cpu())


def places(codes: torch.Tensor) -> torch.Tensor:
    """Where each stands among all e4m3, from the smallest to the largest."""
    bits = codes.view(torch.uint8).int()
    return torch.where(bits > 127, 128 - bits, bits)


def assert_quantised(rows: Fp8Rows, truth: torch.Tensor) -> None:
    """`rows` hold `truth` [T, n] in fp32 as the reference quantises it, nothing is written beside them, and what they
    stand for is as near to the truth."""
    assert_codes_alone_are_written(rows)
    ours, truth = on_cpu(rows), truth.cpu()
    tokens, columns = truth.shape
    expected = empty_fp8_rows(tokens, columns, torch.device("cpu"), pieces=ours.has_pieces, factors=ours.factors)
    quantise_reference(truth, expected)
    torch.testing.assert_close(ours.scale, expected.scale, rtol=SCALES, atol=0)
    off = (places(ours.codes) - places(expected.codes)).abs()
    far = int((off > 1).sum())
    assert int(off.max()) <= 2 and far <= FAR * off.numel(), f"{far} of {off.numel()} codes are steps off"
    assert int(off.sum()) <= STEPS * off.numel() + 1, f"{int(off.sum())} of {off.numel()} codes are a step off"
    values = truth if ours.factors is None else truth * ours.factors
    assert_as_good(dequantise_rows(ours), dequantise_rows(expected), values, ERROR, "e4m3")


def assert_codes_alone_are_written(rows: Fp8Rows) -> None:
    buffer = rows.codes._base
    assert buffer is not None
    beside = buffer.view(torch.uint8).clone()
    beside[:, BEFORE : BEFORE + rows.codes.shape[1]] = UNWRITTEN
    assert bool((beside == UNWRITTEN).all())


def assert_zeros(rows: Fp8Rows, row: int) -> None:
    """`row` stands for zeros, which a later product with anything finite keeps."""
    assert bool((dequantise_rows(on_cpu(rows))[row] == 0).all()) and bool(rows.scale[row].isfinite().all())


def assert_undefined(rows: Fp8Rows, undefined: dict[int, int]) -> None:
    """Each of these rows stands for nothing finite, or with pieces the piece of that column; and nothing else."""
    values, expected = dequantise_rows(on_cpu(rows)), torch.zeros(rows.codes.shape, dtype=torch.bool)
    for row, column in undefined.items():
        start = column // 128 * 128
        expected[row, slice(start, start + 128) if rows.has_pieces else slice(None)] = True
    assert torch.equal(~values.isfinite(), expected)
