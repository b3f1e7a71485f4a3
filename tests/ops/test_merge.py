"""The merged weight is W + B·A with one rounding, and what a small adapter adds survives in it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from steep.kernels import nf4_lora as kernels
from steep.ops.backend import interpreted
from steep.ops.base_weight import BaseWeight, DenseWeight
from steep.ops.merge import merge_reference, merge_write
from tests.ops.closeness import assert_as_good
from tests.ops.quantised import int8, nf4, nf4_on_gpu
from tests.ops.routes import far_apart

SMALL = [(1, 64, 1), (63, 64, 16), (65, 192, 70), (130, 320, 64)]  # no tile, no rank step divides them
REAL = [(14336, 4096, 256), (4096, 14336, 256), (1024, 4096, 16), (1536, 576, 8), (1000, 1088, 100)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count, merge = [], kernels.merge
    monkeypatch.setattr(kernels, "merge", lambda *arguments: count.append(1) or merge(*arguments))
    return count


def adapter(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """B and A as columns of wider buffers; the product is of the size of the weight."""
    rows, columns, rank = shape
    b = (torch.randn(rows, rank + 8) / rank**0.5).to(dtype).to(device)[:, 8:]
    return b, torch.randn(rank, columns + 8).to(dtype).to(device)[:, :columns]


def check_merge(weight: BaseWeight, dense: torch.Tensor, b: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> None:
    rows, columns = dense.shape
    buffer = torch.full((rows + 1, columns + 24), torch.nan, dtype=dtype, device=dense.device)
    out = buffer[:rows, 8 : 8 + columns]
    merge_write(weight, b, a, out)
    truth = (dense.double() + b.double() @ a.double()).float()
    assert_as_good(out, truth.to(dtype), truth, slack=1e-5)
    assert buffer[:, :8].isnan().all() and buffer[:, 8 + columns :].isnan().all()
    assert buffer[rows].isnan().all()  # the last tile's rows end where the weight does


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [*SMALL, (7, 100, 4)])
def test_reference(shape: tuple[int, int, int], double: bool, dtype: torch.dtype, calls: list[int]) -> None:
    weight, dense = nf4(torch.randn(shape[:2]), double)
    check_merge(weight, dense, *adapter(shape, dtype), dtype)
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SMALL)
def test_kernel_interpreted(shape: tuple[int, int, int], double: bool, dtype: torch.dtype, calls: list[int]) -> None:
    weight, dense = nf4(torch.randn(shape[:2]), double)
    with interpreted():
        check_merge(weight, dense, *adapter(shape, dtype), dtype)
    assert calls == [1]


def test_groups_of_row_tiles(calls: list[int]) -> None:
    """More tiles of rows than a group holds, and a last group that is not full."""
    shape = (kernels.ROWS * (kernels.GROUP + 2) + 1, 320, 16)
    weight, dense = nf4(torch.randn(shape[:2]))
    with interpreted():
        check_merge(weight, dense, *adapter(shape, torch.bfloat16), torch.bfloat16)
    assert calls == [1]


@pytest.mark.gpu
def test_rows_far_apart(calls: list[int]) -> None:
    """The third begins beyond 2^31 elements: of B, of A, of the sum."""
    weight, dense = nf4(torch.randn(3, 64), device="cuda")
    b, a = (far_apart(torch.randn(shape, device="cuda").bfloat16()) for shape in ((3, 3), (3, 64)))
    out = far_apart(torch.full((3, 64), torch.nan, dtype=torch.bfloat16, device="cuda"))
    merge_write(weight, b, a, out)
    truth = (dense.double() + b.double() @ a.double()).float()
    assert_as_good(out, truth.bfloat16(), truth, slack=1e-5)
    assert calls == [1]


def test_a_card_without_tensor_cores_for_it_takes_the_product(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    weight, dense = nf4(torch.randn(63, 64))
    with interpreted():
        check_merge(weight, dense, *adapter((63, 64, 16), torch.float16), torch.float16)
    assert calls == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [*SMALL, *REAL])
def test_kernel(shape: tuple[int, int, int], double: bool, dtype: torch.dtype, calls: list[int]) -> None:
    weight, dense = nf4_on_gpu(shape[:2], double)
    check_merge(weight, dense, *adapter(shape, dtype, "cuda"), dtype)
    assert calls == [1]


# --- other storages -------------------------------------------------------------------------------------------


def check_other_storages(monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    monkeypatch.setattr("steep.ops.merge.CHUNK", 3000)  # so that a weight is several chunks, the last not full
    shape = (65, 136, 70)
    for dtype in (torch.bfloat16, torch.float32):
        check_merge(*int8(torch.randn(shape[:2]), device), *adapter(shape, dtype, device), dtype)
        dense = torch.randn(shape[:2], device=device)
        check_merge(DenseWeight(dense), dense, *adapter(shape, dtype, device), dtype)


@pytest.mark.parametrize("context", [nullcontext, interpreted])
def test_other_storages(context: type, monkeypatch: pytest.MonkeyPatch) -> None:
    with context():
        check_other_storages(monkeypatch)


@pytest.mark.gpu
def test_other_storages_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    check_other_storages(monkeypatch, "cuda")


def test_a_rounded_weight_is_refused() -> None:
    b, a = adapter((8, 16, 4), torch.bfloat16)
    with pytest.raises(ValueError, match="rounded already"):
        merge_write(DenseWeight(torch.zeros(8, 16).bfloat16()), b, a, torch.zeros(8, 16).bfloat16())


# --- what an adapter adds ---------------------------------------------------------------------------------------


def gain_and_noise(merged: torch.Tensor, without: torch.Tensor, added: torch.Tensor) -> tuple[float, float]:
    """The least-squares factor of `added` in what the merge changed, and the relative error of that change."""
    change, added = (merged.double() - without.double()).flatten(), added.double().flatten()
    return (change @ added / (added @ added)).item(), ((change - added).norm() / added.norm()).item()


def gain_of_merge(weight: BaseWeight, dense: torch.Tensor, ratio: float) -> tuple[float, float]:
    b, a = adapter((*weight.shape, 16), torch.bfloat16, str(dense.device))
    b = (b * (ratio * dense.norm() / (b.float() @ a.float()).norm())).to(b.dtype)
    merged, without = torch.empty_like(dense, dtype=torch.bfloat16), torch.empty_like(dense, dtype=torch.bfloat16)
    merge_write(weight, b, a, merged)
    merge_write(weight, torch.zeros_like(b), a, without)
    return gain_and_noise(merged, without, b.double() @ a.double())


@pytest.mark.parametrize("path", ["reference", "kernel", "int8"])
def test_a_small_adapter_survives(path: str, calls: list[int]) -> None:
    shape = (1024, 1024)
    weight, dense = int8(torch.randn(shape)) if path == "int8" else nf4(torch.randn(shape))
    with interpreted() if path == "kernel" else nullcontext():
        gain, noise = gain_of_merge(weight, dense, 1e-3)
    assert calls == ([1, 1] if path == "kernel" else [])
    assert 0.98 < gain < 1.02, f"gain {gain:.4f}, noise {noise:.2f}"
    assert noise < 3, f"gain {gain:.4f}, noise {noise:.2f}"


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [1e-4, 1e-3, 1e-2, 1e-1])
def test_a_small_adapter_survives_on_a_gpu(ratio: float) -> None:
    """Noise is 15 times the adapter at a ten-thousandth: over 58 M elements the gain is known to 0.002."""
    gain, noise = gain_of_merge(*nf4_on_gpu((14336, 4096)), ratio)
    assert 0.98 < gain < 1.02, f"gain {gain:.4f}, noise {noise:.2f}"


def test_adding_into_a_rounded_weight_loses_it() -> None:
    weight, dense = nf4(torch.randn(1024, 1024))
    b, a = adapter((1024, 1024, 16), torch.bfloat16)
    b = (b * (1e-3 * dense.norm() / (b.float() @ a.float()).norm())).to(b.dtype)
    rounded = dense.bfloat16()
    merged = (rounded.float() + b.float() @ a.float()).bfloat16()
    gain, _ = gain_and_noise(merged, rounded, b.double() @ a.double())
    assert not 0.98 < gain < 1.02
    kept, _ = gain_and_noise(merge_reference(weight, b, a).bfloat16(), rounded, b.double() @ a.double())
    assert 0.98 < kept < 1.02
