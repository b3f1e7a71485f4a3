"""Weights in e4m3 as other dtypes, turned, and made: bit for bit."""

from __future__ import annotations

import pytest
import torch

from steep.kernels import fp8_weight as kernels
from steep.ops.fp8 import BLOCK, E4M3, Fp8Weight, fp8_reference, quantise_weight
from steep.ops.fp8_linear import transpose
from tests.ops.closeness import error
from tests.ops.fp8_cases import random_codes, with_blocks
from tests.ops.routes import along, assert_nothing_beside, cases, far_apart, unwritten

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
ODD = [(7, 128), (13, 208), (130, 16), (300, 384), (129, 1040), (3, 5)]
REAL = [(4096, 14336), (1024, 4096)]


def every_code(rows: int) -> torch.Tensor:
    """All 256 of them, the two that are undefined too, in each row."""
    return torch.arange(256, dtype=torch.uint8).expand(rows, -1).contiguous().view(E4M3)


def value_of(code: int) -> float:
    """By the definition of the format: a sign, four bits of exponent, three of mantissa, no infinity."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7))


def same_bits(ours: torch.Tensor, truth: torch.Tensor) -> bool:
    """-0 is not 0, and one NaN is as good as another."""
    bits = BITS[ours.dtype]
    defined = ~truth.isnan()
    return bool((ours.isnan() == ~defined).all()) and torch.equal(ours.view(bits)[defined], truth.view(bits)[defined])


def scale_of(codes: torch.Tensor, blocks: bool) -> torch.Tensor:
    rows, columns = codes.shape
    shape = (-(-rows // BLOCK), -(-columns // BLOCK)) if blocks else (rows,)
    return torch.rand(shape).to(codes.device) + 0.5


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("route",), cases([()]))
def test_every_code(route: str, blocks: bool, dtype: torch.dtype) -> None:
    """At a scale of 1 they are what the format says, -0 and the numbers below the normal ones too."""
    with along(route, kernels, write=1) as device:
        codes = every_code(2).to(device)
        out = torch.empty(2, 256, dtype=dtype, device=device)
        Fp8Weight(codes, torch.ones_like(scale_of(codes, blocks))).write(out)
    truth = torch.tensor([value_of(code) for code in range(256)]).to(dtype).expand(2, -1).contiguous()
    assert int(truth.isnan().sum()) == 4 and bool(truth[0, 128].signbit())
    assert same_bits(out.cpu(), truth)
    assert not same_bits(out.cpu() / 2, truth)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("route", "rows", "columns"), cases(ODD, real=REAL))
def test_write(route: str, rows: int, columns: int, blocks: bool, dtype: torch.dtype) -> None:
    """Into columns of a wider buffer: as the reference, rounded once, and nothing beside."""
    with along(route, kernels, write=1) as device:
        codes = random_codes(rows, columns, device)
        weight = Fp8Weight(codes, scale_of(codes, blocks))
        out = unwritten(rows, columns, dtype, device)
        weight.write(out)
    truth = fp8_reference(weight).to(dtype)
    assert torch.equal(out, truth)
    assert not torch.equal(out / 2, truth)
    assert_nothing_beside(out)


def test_each_row_and_block_has_its_own_scale() -> None:
    """Against a loop: the reference itself is not let pass with a scale of its neighbour."""
    codes = random_codes(260, 300, "cpu")
    for blocks in (False, True):
        scale = scale_of(codes, blocks)
        truth = torch.empty(260, 300)
        for row in range(260):
            for column in range(300):
                factor = scale[row // 128, column // 128] if blocks else scale[row]
                truth[row, column] = codes[row, column].float() * factor
        assert torch.equal(fp8_reference(Fp8Weight(codes, scale)), truth)
        assert not torch.equal(fp8_reference(Fp8Weight(codes, scale.roll(1, 0))), truth)


@pytest.mark.gpu
def test_write_beyond_int32() -> None:
    codes = random_codes(3, 256, "cuda")
    weight = Fp8Weight(codes, scale_of(codes, False))
    out = far_apart(torch.zeros(3, 256, dtype=torch.bfloat16, device="cuda"))
    weight.write(out)
    assert torch.equal(out, fp8_reference(weight).bfloat16())


@pytest.mark.parametrize(("route", "rows", "columns"), cases(ODD, real=REAL))
def test_transpose(route: str, rows: int, columns: int) -> None:
    """Each byte as it is, into columns of a wider buffer, from one that is wider too."""
    with along(route, kernels, transpose=1) as device:
        wider = torch.randint(0, 256, (rows, -(-columns // 16) * 16 + 32), dtype=torch.uint8, device=device)
        codes = wider[:, 16 : 16 + columns]
        out = torch.full((columns, rows + 32), 77, dtype=torch.uint8, device=device)
        transpose(codes.view(E4M3), out[:, 16 : 16 + rows].view(E4M3))
    assert torch.equal(out[:, 16 : 16 + rows], codes.t())
    assert bool((out[:, :16] == 77).all()) and bool((out[:, 16 + rows :] == 77).all())


@pytest.mark.gpu
def test_transpose_beyond_int32() -> None:
    codes = torch.randint(0, 256, (5, 3), dtype=torch.uint8, device="cuda")
    out = far_apart(torch.zeros(3, 5, dtype=torch.uint8, device="cuda"))
    transpose(codes.view(E4M3), out.view(E4M3))
    assert torch.equal(out, codes.t())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_quantised_weight(device: str) -> None:
    """The largest of a row is the largest code; the error is that of three bits of mantissa, whatever the row's size; a
    row of zeros stays one."""
    weight = torch.randn(40, 208).to(device, torch.bfloat16)
    weight[1] *= 1000
    weight[2] *= 1e-6
    weight[3] = 0
    stored = quantise_weight(weight)
    assert stored.shape == (40, 208) and not stored.has_blocks
    dense = fp8_reference(stored)
    largest = stored.codes.float().abs().amax(1)
    assert bool((largest[torch.arange(40, device=device) != 3] == 448).all()) and largest[3] == 0
    assert not dense[3].any()
    for row in (0, 1, 2, 39):
        assert error(dense[row], weight[row]) < 0.03 < error(dense[row] / 2, weight[row])
        assert error(with_blocks(weight.float()).codes[row].float(), weight[row]) > 0.03  # codes alone are not it


@pytest.mark.parametrize(
    ("codes", "scale", "named"),
    [
        (torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4), "codes"),
        (torch.zeros(4, dtype=E4M3), torch.ones(4), "codes"),
        (torch.zeros(4, 64, dtype=E4M3)[:, :32], torch.ones(4), "codes"),
        (torch.zeros(4, 32, dtype=E4M3), torch.ones(3), "scale"),
        (torch.zeros(4, 32, dtype=E4M3), torch.ones(4, dtype=torch.bfloat16), "scale"),
        (torch.zeros(4, 32, dtype=E4M3), torch.ones(4, 1), "scale"),
        (torch.zeros(300, 32, dtype=E4M3), torch.ones(2, 1), "scale"),
    ],
)
def test_another_storage_is_refused_by_name(codes: torch.Tensor, scale: torch.Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Fp8Weight(codes, scale)
