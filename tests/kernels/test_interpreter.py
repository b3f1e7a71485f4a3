"""The interpreter of the kernel tests computes what a GPU does, in bf16 and e4m3 too."""

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


E4M3 = torch.float8_e4m3fn
ALL_CODES = torch.arange(256, dtype=torch.uint8).view(E4M3)


def test_dot_of_e4m3() -> None:
    a, b = (ALL_CODES[torch.randint(127, (32, 32))] for _ in range(2))  # subnormal ones too, none undefined
    out = torch.full((32, 32), float("nan"))
    _product[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_every_e4m3_is_cast_up() -> None:
    out = torch.zeros(256)
    _cast[(1,)](ALL_CODES, out, SIZE=256)
    torch.testing.assert_close(out, ALL_CODES.float(), rtol=0, atol=0, equal_nan=True)
    assert out[0x80].signbit() and out.isnan().sum() == 2


def test_cast_to_e4m3_rounds_to_the_nearest_even() -> None:
    """Around each number that e4m3 has, each tie between two and either side of it, and many others."""
    numbers = ALL_CODES[:127].float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    around = torch.cat([numbers, ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(0.0))])
    others = torch.cat([torch.randn(2**14) * 2.0**exponent for exponent in range(-12, 8)]).clamp(-448, 448)
    x = torch.cat([around, -around, others, torch.tensor([1e-41, -1e-41, 2.0**-11, 460.0, -460.0])])
    x = torch.nn.functional.pad(x, (0, 2**19 - x.numel()))
    out = torch.zeros_like(x, dtype=E4M3)
    _cast[(1,)](x, out, SIZE=2**19)
    assert torch.equal(out.view(torch.uint8), x.to(E4M3).view(torch.uint8))


@pytest.mark.parametrize("place", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_cast_to_e4m3_ends_at_the_largest(place: str) -> None:
    """As a card's does; torch's made NaN of what is above 464 in some versions."""
    device = "cuda" if place == "gpu" else "cpu"
    x = torch.tensor([449.0, -465.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 0.0], device=device)
    out = torch.zeros(8, dtype=E4M3, device=device)
    _cast[(1,)](x, out, SIZE=8)
    expected = torch.tensor([448.0, -448.0, 448.0, -448.0, 448.0, -448.0, torch.nan, 0.0])
    torch.testing.assert_close(out.cpu().float(), expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _sum(x, SIZE: tl.constexpr):
    return tl.sum(tl.load(x + tl.arange(0, SIZE)), 0)


@triton.jit
def _sums(x, out, SIZE: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out + row, _sum(x + row * SIZE, SIZE) - _sum(x, SIZE))


def test_a_kernel_may_call_others_and_leaves_the_language_as_it_was() -> None:
    before = dict(vars(tl)), dict(vars(tl.tensor))
    for rows in (2, 3):
        x, out = torch.randn(rows, 32), torch.full((rows,), float("nan"))
        _sums[(rows,)](x, out, SIZE=32)
        torch.testing.assert_close(out, x.sum(1) - x[0].sum(), rtol=1e-5, atol=1e-5)
        assert (dict(vars(tl)), dict(vars(tl.tensor))) == before
