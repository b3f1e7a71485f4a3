"""8-bit weights are read as bitsandbytes reads them, to the bit, by the reference and by the kernel."""

from __future__ import annotations

import pytest
import torch

from steep.kernels import int8 as kernels
from steep.ops.backend import interpreted
from steep.ops.int8 import Int8Weight
from tests.ops.quantised import int8
from tests.ops.routes import far_apart

SMALL = [(1, 1), (3, 100), (9, 576), (2, 2050)]
REAL = [(14336, 4096), (4096, 14336), (1536, 576), (63, 1000)]


def check_write(stored: Int8Weight, truth: torch.Tensor, dtype: torch.dtype) -> None:
    """Into columns of a wider buffer, whose other columns stay as they are."""
    rows, columns = truth.shape
    assert stored.shape == truth.shape
    buffer = torch.full((rows, columns + 24), torch.nan, dtype=dtype, device=truth.device)
    stored.write(buffer[:, 8 : 8 + columns])
    assert torch.equal(buffer[:, 8 : 8 + columns], truth.to(dtype))
    assert buffer[:, :8].isnan().all() and buffer[:, 8 + columns :].isnan().all()
    assert not torch.equal(buffer[:, 8 : 8 + columns] / 2, truth.to(dtype))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count, write = [], kernels.write
    monkeypatch.setattr(kernels, "write", lambda *arguments: count.append(1) or write(*arguments))
    return count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SMALL, (300, 1000)])
def test_reference(shape: tuple[int, int], dtype: torch.dtype, calls: list[int]) -> None:
    check_write(*int8(torch.randn(shape)), dtype)
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SMALL)
def test_kernel_interpreted(shape: tuple[int, int], dtype: torch.dtype, calls: list[int]) -> None:
    with interpreted():
        check_write(*int8(torch.randn(shape)), dtype)
    assert calls == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SMALL, *REAL])
def test_kernel(shape: tuple[int, int], dtype: torch.dtype, calls: list[int]) -> None:
    check_write(*int8(torch.randn(shape), "cuda"), dtype)
    assert calls == [1]


@pytest.mark.gpu
def test_rows_far_apart(calls: list[int]) -> None:
    """The third begins beyond 2^31 elements."""
    stored, truth = int8(torch.randn(3, 100), "cuda")
    out = far_apart(torch.full((3, 100), torch.nan, dtype=torch.bfloat16, device="cuda"))
    stored.write(out)
    assert torch.equal(out, truth.bfloat16())
    assert calls == [1]


def test_another_storage_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="codes"):
        Int8Weight(torch.zeros(4, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="absmax"):
        Int8Weight(torch.zeros(4, 8, dtype=torch.int8), torch.zeros(8))
